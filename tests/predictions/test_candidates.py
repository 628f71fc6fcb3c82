"""What candidates must have in common, and what is refused, through select."""

import numpy as np
import pytest
from candidate_files import (
    POSITIVES,
    VIDEOS,
    refused,
    right_for,
    write_csv,
    write_labels,
    write_own,
)
from reference import gap_loops

from ensemble_kit.choices import MAX_SIZE
from ensemble_kit.errors import PredictionsError
from ensemble_kit.selection.stage import select


def test_two_candidates_of_one_name_are_refused(tmp_path):
    paths = [
        write_own(tmp_path / "p", right_for("a"), name="gru"),
        write_csv(tmp_path / "gru.csv", right_for("b")),
    ]

    assert refused(paths) == (
        f"{paths[0]} and {paths[1]} are both named 'gru'.\n"
        "Leave one out, or rename one: a CSV file, or a run with `train --name`."
    )


@pytest.mark.parametrize(
    ("name", "names"), [("grv", "gru"), ("a.csv", "gru, vlad")], ids=["near", "far"]
)
def test_a_size_of_no_candidate_is_refused(tmp_path, name, names):
    paths = [write_own(tmp_path / "gru", right_for("a")), write_own(tmp_path / "vlad", right_for())]

    assert refused(paths, sizes={name: 4}) == (
        f"A size is given for {name!r}, but there is no such candidate.\nName one of {names}."
    )


@pytest.mark.parametrize("options", [{"max_size": MAX_SIZE}, {"sizes": {"gru": 4}}])
def test_an_unknown_size_is_refused_where_there_is_a_limit(tmp_path, options):
    paths = [
        write_own(tmp_path / "gru", right_for("a")),
        write_csv(tmp_path / "other.csv", right_for("b")),
    ]

    assert refused(paths, **options) == (
        f"The size of other is not known: {paths[1]} does not name a model of the kit.\n"
        "Give the size of every such candidate: --size other=4MB."
    )


def test_gain_per_byte_needs_every_size(tmp_path):
    paths = [write_own(tmp_path / "mean", right_for("a"), size=None)]

    assert refused(paths, criterion="gain-per-byte") == (
        f"The size of mean is not known: {paths[0]} does not name a model of the kit.\n"
        "Give the size of every such candidate: --size mean=4MB."
    )


def test_own_predictions_without_a_model_need_a_size_too(tmp_path):
    paths = [write_own(tmp_path / "mean", right_for("a"), size=None)]

    message = refused(paths, max_size=100)

    assert message.startswith(f"The size of mean is not known: {paths[0]} does not name a model")
    assert select(paths, output=tmp_path / "s.json", max_size=100, sizes={"mean": 7}).bytes == 7


def test_a_model_that_tells_of_no_weights_needs_a_size_too(tmp_path):
    paths = [write_own(tmp_path / "exported", right_for("a"), size=0)]

    message = refused(paths, max_size=100)

    assert message.startswith(f"The size of exported is not known: {paths[0]} does not name a")


def test_other_label_names_are_refused(tmp_path):
    paths = [
        write_own(tmp_path / "p", right_for("a")),
        write_own(tmp_path / "q", right_for("b"), names="vwxyq"),
    ]

    assert refused(paths) == (
        f"{paths[1]} calls class 4 'q', but other candidates, such as {paths[0]}, call it 'z'.\n"
        "Select among predictions of one label vocabulary."
    )


def test_a_csv_of_more_classes_is_refused(tmp_path):
    paths = [
        write_csv(tmp_path / "p.csv", [[0.5] * 7] * 4),
        write_own(tmp_path / "q", right_for("b")),
    ]

    assert refused(paths) == (
        f"{paths[0]} lists class 6; {paths[1]} has 5 classes.\n"
        "Select among predictions of one label vocabulary."
    )


def test_other_videos_are_refused(tmp_path):
    paths = [
        write_own(tmp_path / "p", right_for("a")),
        write_own(tmp_path / "q", right_for("b"), ids=("a", "b", "c", "e")),
    ]

    assert refused(paths, PredictionsError) == (
        f"{paths[1]} lacks video 'd', which {paths[0]} has.\n"
        "Predict all candidates on the same records, or take --intersect to leave out videos."
    )


def test_videos_that_a_file_lacks_are_left_out_if_asked_for(tmp_path):
    rows = {"p": right_for("a", "b", "c"), "q": right_for("d", "b")}
    order = [3, 1, 2]
    paths = [
        write_own(tmp_path / "p", rows["p"]),
        write_own(
            tmp_path / "q",
            [*np.array(rows["q"])[order], [0.25] * 5],
            ids=("d", "b", "c", "e"),
            positives=[*(POSITIVES[index] for index in order), {1}],
        ),
    ]

    selection = select(paths, output=tmp_path / "s.json", intersect=True)

    assert (selection.videos, selection.left_out) == (3, 2)
    kept = {name: [one[index] for index in (1, 2, 3)] for name, one in rows.items()}
    assert {one.name: one.score for one in selection.candidates} == pytest.approx(
        {name: float(gap_loops(one, POSITIVES[1:], 20)) for name, one in kept.items()}
    )
    labels_path = write_labels(tmp_path / "y.csv", VIDEOS[2:], POSITIVES[2:])
    again = select(
        paths, output=tmp_path / "t.json", intersect=True, labels_path=labels_path, resamples=0
    )
    assert (again.videos, again.labels.path) == (2, "y.csv")


def test_no_video_in_common_is_refused(tmp_path):
    paths = [
        write_own(tmp_path / "p", right_for("a")),
        write_own(tmp_path / "q", right_for("b"), ids=("e", "f", "g", "h")),
    ]

    assert refused(paths, PredictionsError, intersect=True) == (
        f"No video is in all of {paths[0]}, {paths[1]}.\n"
        "Predict every candidate on the same records."
    )


def test_a_model_that_has_changed_since_it_predicted_is_refused(tmp_path):
    path = write_own(tmp_path / "gru", right_for("a"))  # by a model whose hash is made up
    path = path.rename(tmp_path / "p")
    (tmp_path / "gru").mkdir()
    model = tmp_path / "gru" / "averaged.safetensors"
    model.write_bytes(b"trained on")

    assert refused([path]) == (
        f"{model} has changed since it predicted {path}.\n"
        f"Predict again with `ensemble-kit predict {model} DATA -o {path}`."
    )


def test_numpys_files_are_candidates_beside_the_kits(tmp_path):
    own = write_own(tmp_path / "own", right_for("a", "b"))
    rows = np.array(right_for("d"))[::-1]
    np.save(tmp_path / "other.npy", rows)
    (tmp_path / "other.ids.txt").write_text("\n".join(VIDEOS[::-1]))

    paths = [tmp_path / "other.npy", own]
    selection = select(paths, output=tmp_path / "first.json", resamples=0)

    assert {member.name for member in selection.members} == {"own", "other"}
    assert {one.name: one.score for one in selection.candidates} == pytest.approx(
        {
            "own": float(gap_loops(right_for("a", "b")[::-1], POSITIVES[::-1], 20)),
            "other": float(gap_loops(rows.tolist(), POSITIVES[::-1], 20)),
        }
    )
    np.save(tmp_path / "other.npy", rows[:, :4])
    assert refused([own, tmp_path / "other.npy"]) == (
        f"{tmp_path / 'other.npy'} has 4 classes, but other candidates, such as {own}, have 5.\n"
        "Select among predictions of one label vocabulary."
    )


def test_other_labels_are_refused_unless_they_are_named(tmp_path):
    paths = [
        write_own(tmp_path / "p", right_for("a")),
        write_own(tmp_path / "q", right_for("b"), positives=[*POSITIVES[:3], {1}]),
    ]

    assert refused(paths) == (
        f"{paths[1]} has other labels than {paths[0]}.\n"
        "Predict every candidate on the same records, or name the labels with --labels."
    )
    labels_path = write_labels(tmp_path / "y.csv", VIDEOS[::-1], POSITIVES[::-1])
    select(paths, output=tmp_path / "s.json", labels_path=labels_path)


def test_no_labels_are_refused(tmp_path):
    csv = write_csv(tmp_path / "p.csv", right_for("a"))
    own = write_own(tmp_path / "q", right_for("a"), positives=[set()] * 4)
    labels_path = write_labels(tmp_path / "y.csv", positives=[set()] * 4)

    for paths, labels, lacking in (
        ([csv], None, csv),
        ([own], None, own),
        ([own], labels_path, labels_path),
    ):
        assert refused(paths, labels_path=labels) == (
            f"{lacking} holds no labels.\nName a CSV file of the videos' labels with --labels."
        )


def test_a_label_outside_of_the_classes_is_refused(tmp_path):
    labels_path = write_labels(tmp_path / "y.csv", positives=[{5}, {0}, {0}, {0}])

    message = refused(
        [write_own(tmp_path / "p", right_for())], PredictionsError, labels_path=labels_path
    )

    assert message == (
        f"{labels_path}, line 2: '5' is not a class, expected a number from 0 to 4.\n"
        "Number the classes from 0, as the records' labels do."
    )
