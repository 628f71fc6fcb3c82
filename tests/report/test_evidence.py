"""What is read of the predictions, against loops over scalars."""

import numpy as np
import pytest
from chosen_fixture import CLASSES, write_chosen

from ensemble_kit.metrics import mean_average_precision
from ensemble_kit.report import evidence
from ensemble_kit.report.evidence import gather
from ensemble_kit.selection.stage import select


def named_loops(row, num_labels):
    """The best classes of one video, as many as it has labels, the lowest first among equals."""
    order = sorted(range(len(row)), key=lambda index: (-row[index], index))
    return {index for index in order[:num_labels] if row[index] > -np.inf}


def agreement_loops(one, other, labels):
    both = named = 0
    for video in range(len(labels)):
        num_labels = sum(labels[video])
        first, second = (named_loops(rows[video], num_labels) for rows in (one, other))
        both += len(first & second)
        named += num_labels
    return both / named


def test_agreement_is_the_share_of_best_classes_that_both_name(chosen):
    seven_videos = 7 * 5

    found = gather(chosen.selection, chosen.path.parent, read_values=seven_videos).agreement

    assert found.names == tuple(one.name for one in chosen.selection.candidates)
    for row, one in enumerate(found.names):
        for column, other in enumerate(found.names):
            expected = agreement_loops(
                chosen.probabilities[one], chosen.probabilities[other], chosen.labels
            )
            assert found.shares[row, column] == pytest.approx(expected)
    off_diagonal = [found.shares[i, j] for i in range(4) for j in range(4) if i != j]
    assert (found.lowest, found.highest) == (min(off_diagonal), max(off_diagonal))


def test_classes_are_compared_by_average_precision_and_the_rare_ones_left_out(chosen):
    changes = gather(chosen.selection, chosen.path.parent).changes

    single = chosen.probabilities[chosen.selection.candidates[0].name]
    ensemble = sum(
        one.coefficient * chosen.probabilities[one.name].astype(np.float64)
        for one in chosen.selection.members
    )
    positives = chosen.labels.sum(axis=0)
    assert positives[-1] == 19 == evidence.FEWEST_POSITIVES - 1
    expected = {}
    for index in range(4):
        only = np.zeros_like(chosen.labels)
        only[:, index] = chosen.labels[:, index]
        before, after = (mean_average_precision(rows, only) for rows in (single, ensemble))
        if before != after:
            expected[CLASSES[index]] = (positives[index], before, after)
    assert {one.name: (one.positives, one.single, one.ensemble) for one in changes} == {
        name: (count, pytest.approx(before), pytest.approx(after))
        for name, (count, before, after) in expected.items()
    }
    gains = [one.change for one in changes if one.change > 0]
    losses = [one.change for one in changes if one.change < 0]
    assert [one.change for one in changes] == sorted(gains, reverse=True) + sorted(losses)


def test_a_missing_file_leaves_out_its_candidate_and_a_changed_one_too(own_chosen):
    last, before = (one.name for one in own_chosen.selection.candidates[:1:-1])
    own_chosen.files[last].unlink()
    own_chosen.files[before].write_bytes(own_chosen.files[before].read_bytes() + b" ")
    paths = {name: f"../runs/{own_chosen.files[name].name}" for name in (last, before)}

    found = gather(own_chosen.selection, own_chosen.path.parent)

    assert found.missing == {
        last: f"{paths[last]} is not there.",
        before: f"{paths[before]} has changed since the selection was made.",
    }
    assert found.agreement.names == tuple(one.name for one in own_chosen.selection.candidates[:2])
    assert found.changes is None  # they are members
    assert {last, before} <= {one.name for one in own_chosen.selection.members}


def test_one_candidate_agrees_with_nobody_and_none_tells_nothing(own_chosen):
    for one in own_chosen.selection.candidates[1:]:
        own_chosen.files[one.name].unlink()

    assert gather(own_chosen.selection, own_chosen.path.parent).agreement is None

    own_chosen.files[own_chosen.selection.candidates[0].name].unlink()
    found = gather(own_chosen.selection, own_chosen.path.parent)
    assert (found.agreement, found.changes, len(found.missing)) == (None, None, 4)


def test_classes_are_compared_without_the_candidates_that_were_not_chosen(tmp_path):
    chosen = write_chosen(tmp_path, max_members=2)
    members = {one.name for one in chosen.selection.members}
    others = [one.name for one in chosen.selection.candidates[1:] if one.name not in members]
    expected = gather(chosen.selection, chosen.path.parent).changes
    chosen.files[others[-1]].unlink()

    found = gather(chosen.selection, chosen.path.parent)

    assert expected
    assert found.changes == expected
    assert len(found.agreement.names) == 3


def test_csv_files_are_read_with_their_labels_and_name_only_what_they_list(tmp_path):
    (tmp_path / "a.csv").write_text(
        "VideoId,LabelConfidencePairs\nx,0 0.9 1 0.8\ny,2 0.7\n", encoding="utf-8"
    )
    (tmp_path / "b.csv").write_text(
        "VideoId,LabelConfidencePairs\ny,2 0.6 0 0.1\nx,1 0.9\n", encoding="utf-8"
    )
    labels = tmp_path / "labels.csv"
    labels.write_text("VideoId,Labels\nx,0 1\ny,2\n", encoding="utf-8")
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    selection = select(
        paths, output=tmp_path / "s.json", labels_path=labels, confirm=0, resamples=0
    )

    found = gather(selection, tmp_path)

    assert found.agreement.shares[0, 1] == pytest.approx(2 / 2)  # b names 2 pairs of 3, a has both
    assert found.changes == ()

    labels.write_text("VideoId,Labels\nx,0\ny,2\n", encoding="utf-8")
    found = gather(selection, tmp_path)
    assert found.missing == {"labels": "labels.csv has changed since the selection was made."}
    assert (found.agreement, found.changes) == (None, None)


def test_a_model_that_has_changed_since_it_predicted_leaves_the_rest_to_be_told(own_chosen):
    folder = own_chosen.path.parents[1] / "runs" / "run-0"
    folder.mkdir()
    (folder / "averaged.safetensors").write_bytes(b"another")

    found = gather(own_chosen.selection, own_chosen.path.parent)

    assert (found.agreement, found.changes) == (None, None)
    assert found.missing["candidates"].endswith(
        "/averaged.safetensors has changed since it predicted "
        f"{own_chosen.path.parent / '../runs/run-0.safetensors'}."
    )


def test_videos_that_were_left_out_are_left_out_again(tmp_path):
    for name, videos in (("a", "xyz"), ("b", "zx")):
        lines = ["VideoId,LabelConfidencePairs", *(f"{video},0 0.9" for video in videos)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = tmp_path / "labels.csv"
    labels.write_text("VideoId,Labels\nx,0\ny,1\nz,0\n", encoding="utf-8")
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    selection = select(paths, output=tmp_path / "s.json", labels_path=labels, intersect=True)

    found = gather(selection, tmp_path)

    assert (selection.left_out, found.num_videos) == (1, 2)
    assert found.agreement.shares[0, 1] == 1
