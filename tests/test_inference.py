import pytest
from builders import POOLINGS, tiny_recipe, tiny_records, tiny_schema, write_checkpoint

from ensemble_kit.errors import OutputError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.inference import evaluate_predictions, predict, rank_model, rank_predictions
from ensemble_kit.networks.loading import load
from ensemble_kit.predictions.file import read_predictions


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))[1]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_predictions_do_not_depend_on_the_batch_size(pooling, records, tmp_path):
    model = tmp_path / "model.safetensors"
    write_checkpoint(model, tiny_recipe(pooling=pooling), records.schema)

    rows = []
    for batch_size in (1, 7, 64):
        output = tmp_path / f"{batch_size}.safetensors"
        predict(model, records, output, repeats=2, batch_size=batch_size)
        rows.append(read_predictions(output).rows(0, 40))

    # float32 sums in another order: some eps of the probabilities, which are at most 1
    assert abs(rows[0] - rows[2]).max() <= 1e-6
    assert abs(rows[1] - rows[2]).max() <= 1e-6


def test_a_predictions_file_says_what_was_predicted_and_by_what(records, tmp_path):
    model = tmp_path / "runs" / "model.safetensors"
    trained = write_checkpoint(model, tiny_recipe(), records.schema, name="mine")
    output = tmp_path / "predictions" / "mine.safetensors"

    assert predict(model, records, output, repeats=3) == output

    found = read_predictions(output)
    videos = list(records.videos())
    assert found.ids == tuple(video.id for video in videos)
    assert found.label_names == records.schema.label_names
    assert found.metadata.name == "mine"
    assert found.metadata.model.kind == "checkpoint"
    assert found.metadata.model.repeats == 3
    assert found.metadata.model.num_values == sum(t.numel() for t in trained.state_dict().values())
    assert found.metadata.model.file.path == "../runs/model.safetensors"
    assert found.metadata.model.file.sha256 == sha256_of(model)
    labels = [found.labels.rows(i, i + 1).classes.tolist() for i in range(40)]
    assert labels == [list(video.classes) for video in videos]
    (batch,) = records.batches(40)
    assert (found.rows(0, 40) == load(model, repeats=3).probabilities(batch)).all()


def test_a_csv_keeps_the_best_classes_of_each_video(records, tmp_path):
    model, output = tmp_path / "model.safetensors", tmp_path / "mine.csv"
    write_checkpoint(model, tiny_recipe(), records.schema)

    predict(model, records, output, top_k=2)

    lines = output.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "VideoId,LabelConfidencePairs"
    assert len(lines) == 41
    (batch,) = records.batches(40)
    scores = load(model).probabilities(batch)
    for line, video, row in zip(lines[1:], batch.ids, scores, strict=True):
        name, pairs = line.split(",")
        best = sorted(range(5), key=lambda index: -row[index])[:2]
        assert name == video
        assert [int(word) for word in pairs.split()[::2]] == best


def test_an_existing_file_is_kept_and_nothing_is_computed(records, tmp_path):
    output = tmp_path / "mine.csv"
    output.touch()

    with pytest.raises(OutputError) as caught:
        predict(tmp_path / "no such model", records, output)

    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )


def test_records_that_do_not_fit_the_model_are_refused(records, tmp_path):
    model = tmp_path / "model.safetensors"
    write_checkpoint(model, tiny_recipe(), tiny_schema(value_type="uint8"))

    with pytest.raises(PredictionsError) as caught:
        predict(model, records, tmp_path / "mine.safetensors")

    assert caught.value.problem == (
        f"{model} has rgb (5 uint8), audio (3 uint8), but these records have rgb (8 uint8), "
        "audio (4 uint8)."
    )
    assert not (tmp_path / "mine.safetensors").exists()


def test_predictions_are_measured_alike_in_blocks_of_any_size(records, tmp_path):
    model = tmp_path / "model.safetensors"
    write_checkpoint(model, tiny_recipe(), records.schema)
    predictions = read_predictions(predict(model, records, tmp_path / "p.safetensors"))

    once = evaluate_predictions(predictions, None, k=3)
    again = evaluate_predictions(predictions, None, k=3, block_values=7 * predictions.num_classes)

    assert once.videos == 40
    assert again == once


@pytest.mark.parametrize("name", ["y.txt", "y.npz", "y.csv.gz", "y.onnx", "y"])
def test_a_suffix_that_says_another_format_is_refused_and_nothing_is_computed(
    name, records, tmp_path
):
    output = tmp_path / name

    with pytest.raises(OutputError) as caught:
        predict(tmp_path / "no such model", records, output)

    assert str(caught.value) == (
        f"{output} does not end in .safetensors or .csv, and predictions are written in no other "
        "format.\nName a .safetensors file, or a .csv file for the challenge's format."
    )
    with pytest.raises(OutputError, match=r"^- stands for standard output, but "):
        predict(tmp_path / "no such model", records, "-")


def test_suffixes_may_be_in_upper_case_and_paths_strings(records, tmp_path):
    model = tmp_path / "model.safetensors"
    write_checkpoint(model, tiny_recipe(), records.schema)

    csv = predict(str(model), records, str(tmp_path / "MINE.CSV"))
    own = predict(model, records, tmp_path / "MINE.SAFETENSORS")

    assert csv.read_text(encoding="utf-8").startswith("VideoId,LabelConfidencePairs\n")
    assert read_predictions(own).ids == tuple(video.id for video in records.videos())


def test_a_model_run_once_has_the_metrics_of_its_predictions(records, tmp_path):
    model, output = tmp_path / "model.safetensors", tmp_path / "predictions.safetensors"
    write_checkpoint(model, tiny_recipe(), records.schema)
    predictions = read_predictions(predict(model, records, output))

    metrics, rankings = rank_model(model, records)

    assert metrics == evaluate_predictions(predictions, None)
    assert rankings == rank_predictions(predictions, None, block_values=50)
