import pytest
from workspace_fixture import MEMBERS, REPEATS

from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import InputError
from ensemble_kit.inference import predict
from ensemble_kit.networks.loading import load
from ensemble_kit.report.scores import score_models


@pytest.fixture
def records(own_workspace):
    return Records([own_workspace.path / "data" / "test"])


def test_every_model_of_a_workspace_has_its_line(exported, own_workspace, own_ensemble, records):
    rows = score_models(own_workspace.path, records)

    forms = [(row.model, row.form, row.repeats) for row in rows]
    assert forms == [
        *((name, form, 1) for name in sorted(MEMBERS) for form in ("last checkpoint", "averaged")),
        *(
            ("ensemble", f"fused {dtype}", repeats)
            for dtype in ("bf16", "fp16", "fp32", "int4", "int8")
            for repeats in (1, REPEATS)
        ),
        ("ensemble", "onnx", REPEATS),
    ]


def test_a_line_is_the_score_of_its_file(exported, own_workspace, own_ensemble, records):
    rows = {
        (row.model, row.form, row.repeats): row for row in score_models(own_workspace.path, records)
    }

    for key, path, repeats in (
        (("bag", "last checkpoint", 1), "runs/bag/checkpoints/step-00000024.safetensors", 1),
        (("bag", "averaged", 1), "runs/bag/averaged.safetensors", 1),
        (("ensemble", "fused bf16", REPEATS), "ensemble/bf16.safetensors", REPEATS),
        (("ensemble", "onnx", REPEATS), "ensemble/ensemble.onnx", None),
    ):
        file = own_workspace.path / path
        expected = load(file, repeats=repeats).measure(records)
        row = rows[key]
        assert (row.gap, row.hit_at_1) == (expected.gap, expected.hit_at_1)
        assert row.num_bytes == file.stat().st_size
        assert 0 < row.seconds_per_video < 10
    assert rows["ensemble", "onnx", REPEATS].gap == pytest.approx(
        rows["ensemble", "fused bf16", REPEATS].gap, abs=5e-4
    )


def test_the_k_of_gap_is_an_argument(own_workspace, records):
    one, twenty = (score_models(own_workspace.path, records, k=k) for k in (1, 20))

    assert [row.gap for row in one] != [row.gap for row in twenty]
    assert [row.hit_at_1 for row in one] == [row.hit_at_1 for row in twenty]
    assert {row.k for row in one} == {1}


def test_a_stopped_run_has_its_last_checkpoint(own_workspace, records):
    own_workspace.averaged("rnn").unlink()

    rows = score_models(own_workspace.path, records)

    assert [row.form for row in rows if row.model == "rnn"] == ["last checkpoint"]


def test_predictions_in_the_ensembles_folder_are_passed_over(
    fused, own_workspace, own_ensemble, records
):
    before = score_models(own_workspace.path, records)
    predict(own_ensemble / "bf16.safetensors", records, own_ensemble / "test.safetensors")

    after = score_models(own_workspace.path, records)
    assert [(row.form, row.gap) for row in after] == [(row.form, row.gap) for row in before]


def test_a_folder_without_runs_is_no_workspace(tmp_path, records):
    with pytest.raises(InputError) as caught:
        score_models(tmp_path, records)

    assert str(caught.value) == (
        f"{tmp_path / 'runs'} holds no runs.\nRun `ensemble-kit train` first."
    )
