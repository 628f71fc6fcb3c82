"""Class numbers with gaps, as in CSV files, against the same files without gaps."""

import numpy as np
import pytest
from candidate_builders import write_text

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import PredictionsError
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.predictions.blending import blend
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.report.evidence import gather
from ensemble_kit.selection.stage import select

CLOSE, FAR = (0, 1, 2, 3, 4), (3, 70, 4_000, 4_001, 999_999)
CLASSES = {"close": CLOSE, "far": FAR}
SCORES = {
    "a": [{0: 0.9, 4: 0.8, 2: 0.1}, {1: 0.5, 3: 0.5}, {4: 0.7, 0: 0.7}, {}],
    "b": [{4: 0.9, 0: 0.3}, {3: 0.6, 1: 0.2, 0: 0.1}, {0: 0.2}, {2: 0.4}],
}
POSITIVES = [[0], [1, 2], [4], [2, 3]]


def write(folder, classes, repeats=1):
    """Write the scores and labels with other class numbers, and return the files."""
    folder.mkdir()
    places = range(len(POSITIVES) * repeats)
    paths = []
    for name, videos in SCORES.items():
        rows = [videos[place % len(videos)].items() for place in places]
        lines = [" ".join(f"{classes[c]} {score}" for c, score in row) for row in rows]
        numbered = (f"v{place},{line}" for place, line in enumerate(lines))
        paths.append(write_text(folder / f"{name}.csv", "VideoId,LabelConfidencePairs", *numbered))
    labels = [" ".join(str(classes[c]) for c in POSITIVES[place % 4]) for place in places]
    numbered = (f"v{place},{line}" for place, line in enumerate(labels))
    return paths, write_text(folder / "labels.csv", "VideoId,Labels", *numbered)


@pytest.fixture
def files(tmp_path):
    return {name: write(tmp_path / name, classes) for name, classes in CLASSES.items()}


@pytest.fixture
def selections(files):
    return {
        name: select(paths, output=paths[0].parent / "s.json", labels_path=labels, top_k=3)
        for name, (paths, labels) in files.items()
    }


def test_no_metric_depends_on_the_numbers_of_the_classes(files):
    close, far = (
        [evaluate_predictions(read_predictions(path), labels, k=3) for path in paths]
        for paths, labels in files.values()
    )

    assert close == far


def test_one_large_class_takes_no_column_for_each_smaller_one(files, monkeypatch):
    sizes = []
    full = np.full
    monkeypatch.setattr(
        np, "full", lambda shape, *rest, **more: sizes.append(shape) or full(shape, *rest, **more)
    )
    paths, labels = files["far"]

    evaluate_predictions(read_predictions(paths[0]), labels)

    assert max(np.prod(shape) for shape in sizes) == len(POSITIVES) * len(FAR)


def test_a_selection_does_not_depend_on_the_numbers_of_the_classes(selections):
    close, far = selections["close"], selections["far"]

    assert (far.score, far.members[0].coefficient) == (close.score, close.members[0].coefficient)
    assert [candidate.score for candidate in far.candidates] == [c.score for c in close.candidates]
    assert far.dataset_sha256 != close.dataset_sha256  # of the labels as the files have them


@pytest.mark.parametrize(("second", "lowest"), [(1, 1 / 2), (7, 0)])
def test_classes_between_those_that_are_named_may_be_what_a_file_left_out(tmp_path, second, lowest):
    listed = f"v0,0 0.9 {second} 0.5"
    path = write_text(tmp_path / "p.csv", "VideoId,LabelConfidencePairs", listed)
    labels = write_text(tmp_path / "labels.csv", "VideoId,Labels", f"v0,{second}")

    selection = select(path, output=tmp_path / "s.json", labels_path=labels, top_k=3, resamples=0)

    assert selection.score == 1 / 2
    assert selection.truncation.score_bounds == (lowest, 1 / 2)  # three of 0.5 may rank first


def test_a_mixture_has_the_classes_of_its_files(selections, files):
    paths, _ = files["far"]
    sources = [(None, path) for path in paths]
    output = paths[0].parent / "mixed.csv"

    blend(paths[0].parent / "s.json", sources, output)

    mixed, weights = {}, {member.name: member.coefficient for member in selections["far"].members}
    for name, weight in weights.items():
        for c, score in SCORES[name][0].items():
            mixed[FAR[c]] = mixed.get(FAR[c], 0) + weight * score
    line = output.read_text().splitlines()[1].removeprefix("v0,").split()
    assert {int(c): float(p) for c, p in zip(line[::2], line[1::2], strict=True)} == (
        pytest.approx(mixed)
    )


def test_the_report_names_classes_as_the_files_do(tmp_path):
    paths, labels = write(tmp_path / "many", FAR, repeats=20)
    output = tmp_path / "many" / "s.json"
    both = {"a": 0.5, "b": 0.5}
    selection = select(paths, output=output, labels_path=labels, coefficients=both, top_k=3)

    changes = gather(selection, output.parent).changes

    assert changes
    assert {each.name for each in changes} <= {f"class {number}" for number in FAR}


def test_a_label_that_a_file_with_names_does_not_have_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    write_predictions(
        path, ids=["v0"], label_names=["x", "y", "z"], labels=LabelLists.from_lists([[]]),
        rows=np.array([[0.5, 0.25, 0.125]], np.float32), name="p", model=None, top_k=2, force=False,
    )  # fmt: skip
    labels = write_text(tmp_path / "labels.csv", "VideoId,Labels", "v0,999999")

    with pytest.raises(PredictionsError) as caught:
        evaluate_predictions(read_predictions(path), labels)

    assert str(caught.value) == (
        f"{labels}, line 2: '999999' is not a class, expected a number from 0 to 2.\n"
        "Number the classes from 0, as the records' labels do."
    )
