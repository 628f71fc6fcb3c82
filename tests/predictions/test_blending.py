"""Other predictions of a selection's members, mixed: against a plain loop, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.cli import main
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import OutputError, PredictionsError, SelectionError
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.predictions.blending import blend
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection.stage import select
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata
from ensemble_kit.store.selection_file import read_selection

NAMES = ("a", "b", "c")
COEFFICIENTS = {"c": 0.625, "a": 0.375}
CLASSES = ("x", "y", "z", "w")


def write_csv(path, rows):
    lines = ["VideoId,LabelConfidencePairs"]
    lines += [
        f"{video}," + " ".join(f"{index} {value!r}" for index, value in row.items())
        for video, row in rows.items()
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_own(path, rows, *, name, sha256="a" * 64, top_k=None):
    """Write predictions of a model, whose rows are lists, and every video's label 1."""
    path.parent.mkdir(exist_ok=True)
    write_predictions(
        path,
        ids=list(rows),
        label_names=CLASSES,
        labels=LabelLists.from_lists([[1]] * len(rows)),
        rows=np.array(list(rows.values()), np.float32),
        name=name,
        model=ModelMetadata(
            file=FileMetadata(path="gone.safetensors", sha256=sha256),
            kind="checkpoint", num_values=10, repeats=1,
        ),
        top_k=top_k,
        force=True,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def selection(tmp_path_factory):
    """A selection of two of three candidates of CSV files, with coefficients of eighths."""
    folder = tmp_path_factory.mktemp("selection")
    rows = {"v1": {0: 0.5, 1: 0.25}, "v2": {3: 0.5}}
    paths = [write_csv(folder / "val" / f"{name}.csv", rows) for name in NAMES]
    (folder / "labels.csv").write_text("VideoId,Labels\nv1,0\nv2,3\n")
    select(
        paths, output=folder / "selection.json", labels_path=folder / "labels.csv",
        coefficients=COEFFICIENTS, resamples=0,
    )  # fmt: skip
    return folder / "selection.json"


@pytest.fixture(scope="module")
def own_selection(tmp_path_factory):
    """The same of candidates that models of the kit predicted."""
    folder = tmp_path_factory.mktemp("own")
    rows = {"v1": [0.1, 0.2, 0.3, 0.4], "v2": [0.4, 0.3, 0.2, 0.1]}
    paths = [write_own(folder / f"{name}.safetensors", rows, name=name) for name in NAMES]
    select(paths, output=folder / "selection.json", coefficients=COEFFICIENTS, resamples=0)
    return folder / "selection.json"


def mixed_of(rows_by_name, coefficients, top_k):
    """The lines of the mixture by loops over single numbers, the classes' best first."""
    first, *_ = coefficients
    lines = {}
    for video in rows_by_name[first]:
        total = {}
        for name, coefficient in coefficients.items():
            for index, value in rows_by_name[name][video].items():
                total[index] = total.get(index, 0.0) + coefficient * value
        best = sorted(total.items(), key=lambda pair: (-pair[1], pair[0]))[:top_k]
        lines[video] = " ".join(f"{index} {value!r}".removesuffix(".0") for index, value in best)
    return lines


def lines_of(path):
    return dict(line.split(",") for line in path.read_text().splitlines()[1:])


rows_of_a_video = st.dictionaries(
    st.integers(0, 5), st.sampled_from([0.0, 0.125, 0.25, 0.75, 1.0]), max_size=5
)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_a_mixture_is_that_of_the_loops(selection, tmp_path_factory, data, top_k):
    folder = tmp_path_factory.mktemp("mixture")
    videos = data.draw(st.permutations(["q", "r", "s", "t"]))[: data.draw(st.integers(1, 4))]
    rows = {
        name: {video: data.draw(rows_of_a_video) for video in data.draw(st.permutations(videos))}
        for name in data.draw(st.permutations(NAMES))
    }
    paths = [write_csv(folder / f"{name}.csv", each) for name, each in rows.items()]

    blended = blend(selection, [(None, path) for path in paths], folder / "out.csv", top_k=top_k)

    assert lines_of(folder / "out.csv") == mixed_of(rows, COEFFICIENTS, top_k)
    assert list(lines_of(folder / "out.csv")) == list(rows["c"])  # the first member's order
    assert (blended.num_videos, blended.unused) == (len(videos), ("b",))
    assert blended.coefficients == COEFFICIENTS


def test_what_only_float64_tells_apart_is_apart_in_the_mixture(selection, tmp_path):
    order = np.random.default_rng(0).permutation(4)
    for name in COEFFICIENTS:
        np.savez(tmp_path / name, probabilities=0.5 + 1e-12 * order[None], ids=np.array(["v"]))
    paths = [tmp_path / f"{name}.npz" for name in COEFFICIENTS]

    blend(selection, [(None, path) for path in paths], tmp_path / "out.csv")

    found = read_predictions(tmp_path / "out.csv").rows(0, 1)
    np.testing.assert_array_equal(found[0].argsort(), order.argsort())
    np.testing.assert_array_equal(np.unique(found).size, 4)


def test_files_of_the_kit_of_numpy_and_csv_are_mixed_together(selection, tmp_path):
    rng = np.random.default_rng(0)
    a, c = rng.random((2, 30, 4))
    ids = [f"v{index}" for index in range(30)]
    np.save(tmp_path / "a.npy", a[::-1])
    (tmp_path / "a.ids.txt").write_text("\n".join(ids[::-1]) + "\n")
    rows = dict(zip(ids, c, strict=True))
    own = write_own(tmp_path / "anything.safetensors", rows, name="c")

    blend(selection, [("a", tmp_path / "a.npy"), (None, own)], tmp_path / "out.safetensors")

    found = read_predictions(tmp_path / "out.safetensors")
    expected = (0.625 * c.astype(np.float32).astype(float) + 0.375 * a).astype(np.float32)
    assert found.ids == tuple(ids)
    np.testing.assert_array_equal(found.rows(0, 30), expected)
    assert found.label_names == CLASSES
    assert evaluate_predictions(found, None).videos == 30  # labels are kept


def test_predictions_of_a_changed_model_are_refused(own_selection, tmp_path):
    rows = {"w": [0.5, 0.5, 0.25, 0.0]}
    a = write_own(tmp_path / "a.safetensors", rows, name="a", sha256="b" * 64)
    c = write_own(tmp_path / "c.safetensors", rows, name="c")

    with pytest.raises(PredictionsError) as caught:
        blend(own_selection, [(None, a), (None, c)], tmp_path / "out.csv")

    assert str(caught.value) == (
        f"{a} was predicted by another model than the member 'a' that was selected.\n"
        f"Predict again with {own_selection.parent / 'gone.safetensors'}, or select again."
    )


def test_what_cannot_be_matched_is_named(selection, tmp_path):
    rows = {"v": {0: 0.5}}
    a, c, test_a = (write_csv(tmp_path / f"{name}.csv", rows) for name in ("a", "c", "test_a"))
    output = tmp_path / "out.csv"

    def refused(*sources):
        with pytest.raises(PredictionsError) as caught:
            blend(selection, sources, output)
        assert not output.exists()
        return str(caught.value)

    assert refused((None, test_a), (None, c)) == (
        f"{test_a} holds predictions of 'test_a', which is no candidate of {selection}.\n"
        f"Give it the name of one of a, b, c, or say whose it is: a={test_a}."
    )
    assert refused((None, a)) == (
        f"'c' is a member of {selection}, and no predictions of it are named.\n"
        "Name those of every member; for a file of another name: c=FILE."
    )
    assert refused((None, a), ("a", test_a), (None, c)) == (
        f"{a} and {test_a} both hold predictions of 'a'.\nLeave one out."
    )
    write_csv(c, rows | {"more": {0: 0.5}})
    assert refused((None, a), (None, c)) == (
        f"{a} lacks video 'more', which {c} has.\nPredict every member on the same records."
    )


def test_a_mixture_of_lists_is_written_as_lists(selection, own_selection, tmp_path):
    rows = {"v": [0.5, 0.25, 0.125, 0.0]}
    a = write_csv(tmp_path / "a.csv", {"v": {0: 0.5}})
    c = write_own(tmp_path / "c.safetensors", rows, name="c")

    with pytest.raises(PredictionsError) as caught:
        blend(selection, [(None, a), (None, c)], tmp_path / "out.safetensors")

    assert str(caught.value) == (
        f"{a} lists only some classes of each video, so {tmp_path / 'out.safetensors'} cannot hold "
        "the mixture.\nName a .csv file as the output."
    )
    np.savez(tmp_path / "a.npz", probabilities=np.eye(4)[:1], ids=np.array(["v"]))
    np.savez(tmp_path / "c.npz", probabilities=np.eye(4)[:1], ids=np.array(["v"]))
    with pytest.raises(PredictionsError) as caught:
        blend(
            selection, [(None, tmp_path / "a.npz"), (None, tmp_path / "c.npz")],
            tmp_path / "out.safetensors",
        )  # fmt: skip
    assert caught.value.problem.startswith(f"{tmp_path / 'c.npz'} does not name its classes, so ")


def test_other_classes_are_refused(own_selection, tmp_path):
    c = write_own(tmp_path / "c.safetensors", {"v": [0.5, 0.25, 0.125, 0.0]}, name="c")
    np.savez(tmp_path / "a.npz", probabilities=np.eye(5)[:1], ids=np.array(["v"]))

    with pytest.raises(SelectionError) as caught:
        blend(own_selection, [(None, tmp_path / "a.npz"), (None, c)], tmp_path / "out.csv")

    assert str(caught.value) == (
        f"{tmp_path / 'a.npz'} has 5 classes, but other candidates, such as {c}, have 4.\n"
        "Predict with members of one label vocabulary."
    )


def test_the_command_mixes_files_and_refuses_what_it_does_not_read(
    runner, selection, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = {"v": {0: 0.5, 1: 0.25}, "w": {2: 1.0}}
    for name in ("a", "b", "test_c"):
        write_csv(Path(f"{name}.csv"), rows)
    words = ["predict", str(selection), "--predictions", "a.csv", "c=test_c.csv"]

    result = runner.invoke(main, [*words, "b.csv", "-o", "out.csv"])

    assert result.exit_code == 0, result.output
    assert result.stdout == "out.csv: 2 videos, mixed of c 0.625, a 0.375\n"
    assert "No members, so not used: b.\n" in result.stderr
    assert lines_of(Path("out.csv")) == {"v": "0 0.5 1 0.25", "w": "2 1"}
    again = runner.invoke(main, [*words, "-o", "out.csv"])
    assert again.stderr.startswith("Error: out.csv exists already.\n")
    as_json = runner.invoke(main, [*words, "-o", "out.csv", "--force", "--json", "--quiet"])
    assert json.loads(as_json.stdout)["coefficients"] == COEFFICIENTS
    device = runner.invoke(main, [*words, "-o", "out2.csv", "--device", "cpu"])
    assert device.exit_code == 2
    assert device.stderr.endswith(
        "Error: --device does not go with --predictions, which reads no records.\n"
    )
    folder = runner.invoke(main, [*words, "-o", "out/"])
    assert folder.exit_code == 1
    assert "does not end in .safetensors or .csv" in folder.stderr
    missing = runner.invoke(main, [*words, "d=none.csv", "-o", "out2.csv"])
    assert missing.stderr == "Error: none.csv does not exist.\nName a file or folder that exists.\n"


def test_what_was_selected_is_not_overwritten_by_its_mixture(selection, tmp_path):
    with pytest.raises(OutputError):
        blend(selection, [], selection)
    assert read_selection(selection).mixing == "given"
