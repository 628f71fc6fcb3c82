import pytest
import torch
from builders import tiny_model, tiny_recipe, tiny_records

from ensemble_kit.averaging.recalibration import recalibrate
from ensemble_kit.data.dataset import Records
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals

STATISTICS = ("running_mean", "running_variance")


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))[0]


def test_recalibrated_statistics_are_those_of_one_pass_over_the_records(training):
    model = tiny_model(tiny_recipe(sampling="all", probability_gating=True), training.schema)
    seen = {}  # layer name -> what it was given in each batch, with how often each row counts

    def note(name):
        def hook(_, arguments):
            values, *weights = arguments
            counts = weights[0].flatten() if weights else torch.ones(values.shape[0])
            rows = values.flatten(0, -2).repeat_interleave(counts.long(), dim=0)
            seen.setdefault(name, []).append(rows.double())

        return hook

    layers = {name: part for name, part in model.named_modules() if isinstance(part, BatchNorm)}
    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    recalibrate(model, training, num_videos=64, batch_size=32)

    for hook in hooks:
        hook.remove()
    assert len(layers) == 5
    for name, layer in layers.items():
        batches = seen[name]
        assert len(batches) == 2  # 64 videos of the 96
        mean = sum(rows.mean(dim=0) for rows in batches) / 2
        variance = sum(rows.var(dim=0) for rows in batches) / 2
        # float32 sums over some hundred rows
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.running_variance.double(), variance, rtol=1e-5, atol=1e-5)
        assert layer.momentum == 0.1
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_recalibration_ends_with_the_records(training):
    model = tiny_model(tiny_recipe(sampling="all"), training.schema)
    sizes = []
    model.input_batch_norm.register_forward_pre_hook(
        lambda _, arguments: sizes.append(len(arguments[0]))
    )

    recalibrate(model, training, num_videos=10_000, batch_size=32)

    assert sizes == [32, 32, 32]


def test_recalibrating_again_forgets_the_first_time(training):
    model = tiny_model(tiny_recipe(), training.schema)
    recalibrate(model, training, num_videos=96, batch_size=32)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if name.endswith(STATISTICS):
            tensor += 1

    recalibrate(model, training, num_videos=96, batch_size=32)

    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, first[name]), name


def test_whitening_is_recalibrated_as_batch_norms_are(training, monkeypatch):
    model = tiny_model(tiny_recipe(pooling="second_order", sampling="all"), training.schema)
    layers = [part for part in model.modules() if isinstance(part, WhitenedResiduals)]
    seen = {layer: [] for layer in layers}
    for layer in layers:

        def noted(frames, assignment, row_weights, layer=layer, describe=layer.describe):
            seen[layer].append(frames[row_weights > 0].double())
            return describe(frames, assignment, row_weights)

        monkeypatch.setattr(layer, "describe", noted)

    recalibrate(model, training, num_videos=64, batch_size=32)

    assert len(layers) == 4
    for layer in layers:
        assert len(seen[layer]) == 2  # 64 videos of the 96
        moments = []
        for rows in seen[layer]:
            differences = rows.unsqueeze(1) - layer.centres  # (frames, K, D)
            if layer.order == 2:
                differences = (differences.unsqueeze(-1) * differences.unsqueeze(-2)).flatten(-2)
            residuals = differences / differences.norm(dim=-1, keepdim=True)
            moments.append((residuals.mean(dim=0), residuals.var(dim=0, correction=0)))
        for statistic, batches in zip(
            (layer.running_mean, layer.running_variance), zip(*moments, strict=True), strict=True
        ):
            # float32 sums over some hundred rows
            mean = sum(batches) / 2
            torch.testing.assert_close(statistic.double(), mean, rtol=1e-5, atol=1e-5)
        assert layer.momentum == 0.1
    assert not model.training


def test_dropout_drops_nothing_while_statistics_are_estimated(training):
    plain = tiny_model(tiny_recipe(), training.schema)
    dropping = tiny_model(tiny_recipe(overrides=["hidden.dropout=0.5"]), training.schema)
    dropping.load_state_dict(plain.state_dict())

    for model in (plain, dropping):
        recalibrate(model, training, num_videos=96)

    for name, tensor in dropping.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_a_batch_of_bad_records_alone_is_not_looked_at(training, tmp_path):
    content = bytearray(training.paths[0].read_bytes())
    content[-6] ^= 0x40  # the last record's payload
    (tmp_path / "bad.tfrecord").write_bytes(content)
    records = Records([tmp_path], skip_bad_records=True, schema=training.schema)
    model = tiny_model(tiny_recipe(sampling="all"), training.schema)

    recalibrate(model, records, num_videos=96, batch_size=1)

    assert records.num_skipped == 1
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_recalibration_leaves_the_callers_random_numbers_alone(training):
    model = tiny_model(tiny_recipe(sampling="random"), training.schema)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)

    recalibrate(model, training, num_videos=8)

    assert torch.equal(torch.rand(3), expected)
