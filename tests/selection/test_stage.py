"""Selection against the greedy rule as loops, and what it refuses."""

import json
from fractions import Fraction
from itertools import combinations, permutations

import numpy as np
import pytest
from candidate_files import (
    MISSING,
    POSITIVES,
    VIDEOS,
    refused,
    right_for,
    write_csv,
    write_labels,
    write_own,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import gap_loops, greedy_loops, macro_map_loops, map_loops, mixed_loops

from ensemble_kit.choices import MAX_SIZE
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import OutputError, SelectionError, SizeLimitError
from ensemble_kit.files import sha256_of
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.predictions.file import read_predictions
from ensemble_kit.predictions.videos import dataset_sha256, held_out
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection.stage import find_predictions, select
from ensemble_kit.store.provenance import FileMetadata, PredictionsMetadata
from ensemble_kit.store.selection_file import read_selection
from ensemble_kit.store.tensor_files import open_tensors


@st.composite
def selections(draw):
    """Candidates with eighths as scores, so that sums are exact and ties are everywhere."""
    num_videos, num_classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    candidates = {}
    for name in draw(st.permutations("vwxyz"))[: draw(st.integers(1, 5))]:
        is_csv = draw(st.booleans())
        score = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.875] + [MISSING] * is_csv)
        row = st.lists(score, min_size=num_classes, max_size=num_classes)
        candidates[name] = draw(st.lists(row, min_size=num_videos, max_size=num_videos))
    classes = st.sets(st.integers(0, num_classes - 1), max_size=3)
    positives = draw(st.lists(classes, min_size=num_videos, max_size=num_videos))
    positives[0] |= {num_classes - 1}
    sizes = {name: draw(st.sampled_from([4, 8])) for name in candidates}
    return candidates, sizes, positives, draw(st.integers(1, 4)), draw(st.integers(8, 24))


@settings(max_examples=60, deadline=None)
@given(selections(), st.sampled_from(["uniform", "gap"]))
def test_the_path_is_that_of_the_loops(tmp_path_factory, case, mixing):
    candidates, sizes, positives, k, limit = case
    folder = tmp_path_factory.mktemp("selection")
    ids = [f"video{index}" for index in range(len(positives))]
    paths = [
        write_csv(folder / f"{name}.csv", rows, ids)
        if MISSING in np.array(rows)
        else write_own(folder / name, rows, ids=ids, positives=positives)
        for name, rows in candidates.items()
    ]

    selection = select(
        paths,
        output=folder / "s.json",
        max_size=limit,
        mixing=mixing,
        top_k=k,
        labels_path=write_labels(folder / "labels", ids, positives),
        sizes=sizes,
        resamples=0,
        strategy="greedy",
    )

    gaps = {one.name: one.score for one in selection.candidates}
    assert gaps == pytest.approx(
        {name: float(gap_loops(rows, positives, k)) for name, rows in candidates.items()}, abs=1e-12
    )
    weights = gaps
    if mixing == "uniform" or not any(gaps[name] for name in gaps if sizes[name] <= limit):
        weights = dict.fromkeys(gaps, Fraction(1))
    expected = greedy_loops(candidates, weights, sizes, positives, k, limit)
    assert [step.added for step in selection.path] == [name for name, _ in expected]
    assert [step.score for step in selection.path] == pytest.approx(
        [float(gap) for _, gap in expected], abs=1e-12
    )
    members = [name for name, _ in expected]
    assert [member.name for member in selection.members] == members
    assert selection.bytes == sum(sizes[name] for name in members) <= limit
    total = float(sum(weights[name] for name in members))
    for member in selection.members:
        others = [name for name in members if name != member.name]
        mixed = mixed_loops(
            [candidates[name] for name in others], [weights[name] for name in others]
        )
        without = gap_loops(mixed, positives, k) if others else 0
        assert member.score_without == pytest.approx(float(without), abs=1e-12)
        assert member.score == gaps[member.name]
        assert member.coefficient == pytest.approx(float(weights[member.name]) / total, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(selections(), st.data())
def test_given_coefficients_have_the_gap_of_the_loops(tmp_path_factory, case, data):
    candidates, _, positives, k, _ = case
    folder = tmp_path_factory.mktemp("given")
    ids = [f"video{index}" for index in range(len(positives))]
    paths = [write_csv(folder / f"{name}.csv", rows, ids) for name, rows in candidates.items()]
    members = data.draw(st.permutations(list(candidates)))[: data.draw(st.integers(1, 3))]
    shares = {1: [1.0], 2: [0.25, 0.75], 3: [0.5, 0.125, 0.375]}[len(members)]

    selection = select(
        paths,
        output=folder / "s.json",
        coefficients=dict(zip(members, shares, strict=True)),
        top_k=k,
        labels_path=write_labels(folder / "labels", ids, positives),
        resamples=0,
    )

    mixed = mixed_loops([candidates[name] for name in members], shares)
    assert selection.score == pytest.approx(float(gap_loops(mixed, positives, k)), abs=1e-12)
    assert [one.name for one in selection.members] == members
    assert [one.coefficient for one in selection.members] == shares
    assert [step.added for step in selection.path] == members
    assert (selection.mixing, selection.search.strategy) == ("given", "given")
    assert selection.search.greedy_score is None
    reasons = {one.name: one.skipped for one in selection.candidates}
    assert {reasons[name] for name in members} == {None}
    assert {reasons[name] for name in candidates.keys() - set(members)} <= {
        "It was given no coefficient."
    }


def test_given_coefficients_near_a_sum_of_1_are_scaled_to_it(tmp_path):
    paths = [write_own(tmp_path / name, right_for(*"ab")) for name in "xyz"]

    selection = select(
        paths, output=tmp_path / "s.json", coefficients=dict.fromkeys("xyz", 0.333), confirm=0
    )

    assert [one.coefficient for one in selection.members] == [1 / 3] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coefficients": {"x": 0.4}},
            "The coefficients given sum to 0.4; they must sum to 1.\n"
            "Give every member its own, such as --weight gru=0.4 --weight vlad=0.6.",
        ),
        (
            {"coefficients": {"x": 1.5, "y": -0.5}},
            "The coefficient of y is -0.5; it must be above 0.\n"
            "Leave out the --weight of a candidate that is to be no member.",
        ),
        (
            {"coefficients": {"x": float("nan")}},
            "The coefficient of x is nan; it must be above 0.\n"
            "Leave out the --weight of a candidate that is to be no member.",
        ),
        (
            {"coefficients": {"x": 0.5, "xy": 0.5}},
            "'xy' is given a coefficient, but there is no such candidate.\nName one of y.",
        ),
        (
            {"coefficients": {"x": 0.5, "y": 0.5}, "mixing": "gap"},
            "--mixing says how members are chosen, but --weight names them.\n"
            "Leave out --mixing, or every --weight.",
        ),
        (
            {"coefficients": {"x": 0.5, "y": 0.5}, "max_size": 150},
            "The members given (x, y) do not fit in 150 bytes.\nRaise --max-size, or name fewer.",
        ),
    ],
)
def test_coefficients_that_cannot_be_taken_are_refused(tmp_path, options, message):
    paths = [write_own(tmp_path / name, right_for(*"ab")) for name in "xy"]

    with pytest.raises((SelectionError, SizeLimitError)) as caught:
        select(paths, output=tmp_path / "s.json", **options)

    assert str(caught.value) == message
    assert not (tmp_path / "s.json").exists()


def test_the_order_of_candidates_and_of_their_videos_changes_nothing_without_ties(tmp_path):
    ab, c, d = np.array([right_for("a", "b"), right_for("c"), right_for("d")])
    ab, c, d = (one + np.random.default_rng(0).random((4, 5)) / 16 for one in (ab, c, d))
    order = [2, 0, 3, 1]
    ids, positives = [VIDEOS[index] for index in order], [POSITIVES[index] for index in order]
    paths = [
        write_own(tmp_path / "ab", ab),
        write_own(tmp_path / "c", c[order], ids=ids, positives=positives),
        write_csv(tmp_path / "d.csv", d[::-1].tolist(), VIDEOS[::-1]),
    ]

    found = [
        select(order, output=tmp_path / "s.json", resamples=0, force=True)
        for order in permutations(paths)
    ]

    assert len(found[0].members) == 3
    assert all(one.members == found[0].members for one in found)


def test_the_gap_of_one_member_is_what_evaluate_prints(tmp_path):
    generator = np.random.default_rng(0)
    path = write_own(tmp_path / "one", generator.random((4, 5)))

    selection = select([path], output=tmp_path / "s.json", top_k=3)

    assert selection.score == evaluate_predictions(read_predictions(path), None, k=3).gap


def test_copies_of_a_member_are_never_added(tmp_path):
    rows = np.random.default_rng(0).random((4, 5))  # thirds of their sum would round
    paths = [
        write_own(tmp_path / name, rows, size=size)
        for name, size in zip("xyz", (8, 4, 6), strict=True)
    ]

    selection = select(paths, output=tmp_path / "s.json")

    assert [member.name for member in selection.members] == ["y"]
    assert [one.skipped for one in selection.candidates] == [
        None,
        "It does not raise the GAP.",
        "It does not raise the GAP.",
    ]


def test_of_equal_candidates_of_one_size_the_first_by_name_is_chosen(tmp_path):
    paths = [write_own(tmp_path / name, right_for("a")) for name in ("y", "x", "z")]

    assert select(paths, output=tmp_path / "s.json").members[0].name == "x"


def test_what_does_not_fit_is_skipped_for_what_does(tmp_path):
    paths = [
        write_own(tmp_path / "best", right_for("a", "b", "c"), size=600),
        write_own(tmp_path / "large", right_for("d"), size=500),
        write_own(tmp_path / "small", right_for("d", score=0.25), size=400),
    ]

    selection = select(paths, output=tmp_path / "s.json", max_size=1000)

    assert [(step.added, step.bytes) for step in selection.path] == [("best", 600), ("small", 1000)]
    assert {one.name: one.skipped for one in selection.candidates} == {
        "best": None,
        "small": None,
        "large": "It takes 500 bytes, but only 0 bytes remain.",
    }


@pytest.mark.parametrize(("dtype", "num_bytes"), [("fp32", 400), ("fp16", 200), ("bf16", 200)])
def test_bytes_are_counted_in_the_type_of_the_fused_file(tmp_path, dtype, num_bytes):
    path = write_own(tmp_path / "p", right_for("a"), size=200)

    assert select([path], output=tmp_path / "s.json", dtype=dtype).bytes == num_bytes


def test_csv_files_of_unknown_size_count_nothing_where_there_is_no_limit(tmp_path):
    paths = [write_csv(tmp_path / f"{name}.csv", right_for(name)) for name in ("c", "d")]

    selection = select(
        paths, output=tmp_path / "s.json", labels_path=write_labels(tmp_path / "y.csv")
    )

    assert [(member.name, member.bytes) for member in selection.members] == [("d", 0), ("c", 0)]
    assert [member.model for member in selection.members] == [None, None]
    assert selection.vocabulary_sha256 is None


def test_the_file_holds_all_of_it_with_paths_from_its_own_folder(tmp_path):
    runs = {name: tmp_path / "runs" / name / "validation.safetensors" for name in ("gru", "vlad")}
    for (name, path), rows in zip(
        runs.items(), (right_for("c", "d"), right_for("a", "b")), strict=True
    ):
        path.parent.mkdir(parents=True)
        write_own(path, rows, name=name)
    output = tmp_path / "ensemble" / "selection.json"

    selection = select(list(runs.values()), output=output, top_k=4, strategy="greedy")

    assert read_selection(output) == selection
    first, second = selection.members
    assert (first.name, first.coefficient, first.bytes) == ("gru", 0.5, 100)
    assert first.predictions == FileMetadata(
        path="../runs/gru/validation.safetensors", sha256=sha256_of(runs["gru"])
    )
    assert first.model.file.path == "../runs/gru/validation/averaged.safetensors"
    assert second.score == first.score_without < selection.score
    labels = LabelLists.from_lists(map(sorted, POSITIVES))
    written = json.loads(output.read_text(encoding="utf-8"))
    intervals = [
        (step.pop("interval"), step.pop("gain_interval"), step.pop("is_distinguishable"))
        for step in written["path"]
    ]
    assert all(low <= high for pair in intervals for low, high in pair[:2])
    assert [decided for *_, decided in intervals] == [gain[0] > 0 for _, gain, _ in intervals]
    candidate = {
        "dtype": "bf16",
        "confirmed_score": None,
        "bytes": 100,
        "bytes_by_dtype": {"fp32": 200, "fp16": 100, "bf16": 100, "int8": 50, "int4": 25},
        "num_values": 50,
        "skipped": None,
        "top_k": None,
    }
    assert written == {
        "kind": "selection",
        "kit_version": selection.kit_version,
        "metric": "gap",
        "k": 4,
        "dtypes": ["bf16"],
        "max_size": MAX_SIZE,
        "mixing": "uniform",
        "rule": "Greedy, without replacement: start from the best candidate that fits; of those "
        "that fit in the remaining bytes, add the one with the best GAP, until none raises the "
        "GAP. Ensembles are compared by the GAP of the uniform mean of the members' probabilities; "
        "of equal ensembles, the one with fewer bytes wins, then the first by name.",
        "search": {
            "strategy": "greedy",
            "criterion": "gain",
            "max_members": None,
            "beam_width": None,
            "start": [],
            "excluded": [],
            "evaluations": 3,
            "greedy_score": None,
            "greedy_path": None,
        },
        "dataset_sha256": dataset_sha256(VIDEOS, labels),
        "vocabulary_sha256": read_predictions(runs["gru"]).metadata.vocabulary_sha256,
        "labels": None,
        "videos": 4,
        "left_out": 0,
        "positives": 6,
        "score": selection.score,
        "bytes": 200,
        "shared_bytes": 0,
        "members": [member.model_dump() for member in selection.members],
        "path": [
            {
                "added": name,
                "dtype": "bf16",
                "score": gap,
                "gain": gain,
                "bytes": size,
                "confirmed_score": None,
                "confirmed_gain": None,
            }
            for name, gap, gain, size in (
                ("gru", first.score, first.score, 100),
                ("vlad", selection.score, selection.score - first.score, 200),
            )
        ],
        "frontier": [
            {
                "members": names,
                "dtypes": ["bf16"] * len(names),
                "score": gap,
                "confirmed_score": None,
                "bytes": 100 * len(names),
            }
            for names, gap in ((["gru"], first.score), (["gru", "vlad"], selection.score))
        ],
        "frontiers": {},
        "candidates": [
            {
                "name": member.name,
                "score": member.score,
                "predictions": member.predictions.model_dump(),
                **candidate,
            }
            for member in (first, second)
        ],
        "confirm": None,
        "bootstrap": {"resamples": 200, "level": 0.95, "seed": 0},
        "optimised": None,
        "truncation": None,
    }


def test_the_runs_of_a_workspace_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("vlad", "gru"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "validation.safetensors").touch()

    assert [path.parent.name for path in find_predictions()] == ["gru", "vlad"]


def test_a_workspace_without_runs_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(SelectionError) as caught:
        find_predictions()

    assert str(caught.value) == (
        f"There are no predictions: runs/*/validation.safetensors matches nothing in {tmp_path}.\n"
        "Name predictions files, or change to a folder where `ensemble-kit train` ran."
    )


@pytest.mark.parametrize(("num_videos", "fraction"), [(1999, None), (2000, 0.5)])
def test_half_are_held_out_from_2000_videos_on(tmp_path, num_videos, fraction):
    ids = [f"video{index}" for index in range(num_videos)]
    rows = np.random.default_rng(0).random((num_videos, 5))
    path = write_own(tmp_path / "p", rows, ids=ids, positives=[{0}] * num_videos)

    confirm = select([path], output=tmp_path / "s.json", resamples=0).confirm

    assert (confirm and confirm.fraction) == fraction


def test_the_videos_held_out_confirm_the_choice(tmp_path):
    generator = np.random.default_rng(0)
    ids = [f"video{index}" for index in range(40)]
    positives = [set(generator.integers(5, size=2).tolist()) for _ in ids]
    rows = {name: generator.random((40, 5)).round(5) for name in "xy"}
    paths = [
        write_own(tmp_path / name, one, ids=ids, positives=positives) for name, one in rows.items()
    ]

    selection = select(paths, output=tmp_path / "s.json", top_k=3, confirm=0.5)

    is_held_out = held_out(ids, 0.5)
    assert selection.confirm.fraction == 0.5
    assert 10 < np.count_nonzero(is_held_out) < 30
    names = [member.name for member in selection.members]
    mixed = np.array(
        mixed_loops([rows[name].tolist() for name in names], [1] * len(names)), np.float64
    )
    for part, measured in (
        (~is_held_out, selection.confirm.chosen_by),
        (is_held_out, selection.confirm.held_out),
    ):
        labels = [one for one, is_in in zip(positives, part, strict=True) if is_in]
        assert measured.videos == len(labels)
        assert measured.positives == sum(map(len, labels))
        assert measured.score == pytest.approx(float(gap_loops(mixed[part].tolist(), labels, 3)))
        assert measured.interval[0] < measured.score < measured.interval[1]
    assert selection.score == pytest.approx(float(gap_loops(mixed.tolist(), positives, 3)))
    last = selection.path[-1]
    assert (last.score, last.confirmed_score) == (
        selection.confirm.chosen_by.score,
        selection.confirm.held_out.score,
    )
    assert last.interval == selection.confirm.held_out.interval
    everything = select(paths, output=tmp_path / "all.json", top_k=3, confirm=0)
    assert everything.confirm is None


def test_scores_that_float32_would_make_equal_keep_their_order(tmp_path):
    positives = [{index % 5} for index in range(40)]
    ids = [f"video{index}" for index in range(40)]
    noise = np.random.default_rng(0).random((40, 5))
    right = np.array([[index in one for index in range(5)] for one in positives])
    weak, strong = 0.5 + 1e-9 * noise, 0.5 + 1e-9 * (noise + right)  # one number in float32
    assert len(np.unique(strong.astype(np.float32))) == 1
    labels_path = write_labels(tmp_path / "y.csv", ids, positives)
    np.save(tmp_path / "weak.npy", weak)
    (tmp_path / "weak.ids.txt").write_text("\n".join(ids))
    np.savez(tmp_path / "strong.npz", probabilities=strong, ids=ids)
    paths = [tmp_path / "weak.npy", tmp_path / "strong.npz"]
    paths.append(write_csv(tmp_path / "text.csv", strong.tolist(), ids))
    expected = {"weak": weak, "strong": strong, "text": strong}

    selection = select(
        paths, output=tmp_path / "s.json", labels_path=labels_path, resamples=0, top_k=3
    )

    gaps = {name: float(gap_loops(rows.tolist(), positives, 3)) for name, rows in expected.items()}
    assert gaps["weak"] < 0.4 < gaps["strong"] == 1
    assert {one.name: one.score for one in selection.candidates} == pytest.approx(gaps, abs=1e-12)
    assert [member.name for member in selection.members] == ["strong"]
    for path in paths:
        gap = evaluate_predictions(read_predictions(path), labels_path, k=3).gap
        assert gap == pytest.approx(gaps[path.stem], abs=1e-12)


def test_paths_may_be_strings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "a.csv", right_for("a"))
    write_labels(tmp_path / "y.csv")

    selection = select(["a.csv"], output="ensemble/s.json", labels_path="y.csv")

    assert read_selection(tmp_path / "ensemble" / "s.json") == selection
    assert selection.members[0].predictions.path == "../a.csv"


def test_the_very_same_selection_may_be_kept(tmp_path):
    paths, output = [write_own(tmp_path / "p", right_for("a"))], tmp_path / "s.json"
    selection = select(paths, output=output)
    written = output.stat().st_mtime_ns

    assert select(paths, output=output, keep_same=True) == selection
    assert output.stat().st_mtime_ns == written
    with pytest.raises(OutputError) as caught:
        select(paths, output=output, keep_same=True, seed=1)
    assert str(caught.value).startswith(f"{output} exists already.")


def test_a_selection_is_not_overwritten_unless_forced(tmp_path):
    paths, output = [write_own(tmp_path / "p", right_for("a"))], tmp_path / "s.json"
    select(paths, output=output)

    with pytest.raises(OutputError) as caught:
        select(paths, output=output)

    select(paths, output=output, force=True)
    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )


def test_no_candidates_are_the_callers_error(tmp_path):
    with pytest.raises(ValueError, match=r"^there are no predictions to select from$"):
        select([], output=tmp_path / "s.json")


def test_nothing_that_fits_is_refused_with_the_smallest(tmp_path):
    paths = [
        write_own(tmp_path / name, right_for("a"), size=size)
        for name, size in (("gru", 3 * 2**20), ("vlad", 4 * 2**20))
    ]

    assert refused(paths, SizeLimitError, max_size=2**20) == (
        "No candidate fits in 1.0 MiB: gru, the smallest, takes 3.0 MiB. In int4 it "
        "would fit.\nRaise --max-size, or train a smaller sub-model."
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"start": ["gru", "vlat"]},
            "'vlat' is a member to start with, but there is no such candidate.\nName one of vlad.",
        ),
        (
            {"exclude": ["grv"]},
            "'grv' is to be left out, but there is no such candidate.\nName one of gru.",
        ),
        (
            {"exclude": ["gru"], "start": ["gru"]},
            "'gru' is a member to start with, but there is no such candidate.\nName one of vlad.",
        ),
        (
            {"exclude": ["gru", "vlad"]},
            "All candidates are left out.\nName fewer of them with --exclude.",
        ),
        (
            {"start": ["gru", "vlad"], "max_members": 1},
            "There are 2 members to start with, but an ensemble may have only 1.\n"
            "Raise --max-members, or start with fewer.",
        ),
        (
            {"start": ["gru", "gru"]},
            "'gru' is given twice as a member to start with.\nGive each --start once.",
        ),
        (
            {"strategy": "beam", "criterion": "gain-per-byte"},
            "The strategy beam compares whole ensembles, but gain-per-byte compares additions.\n"
            "Use --strategy greedy or replacement with --criterion gain-per-byte.",
        ),
        (
            {"confirm": 0.99},
            "--confirm 0.99 leaves 0 videos to choose by, without any label.\n"
            "Predict more videos, or choose by all of them with --confirm 0.",
        ),
        (
            {"confirm": 0.01},
            "--confirm 0.01 leaves 0 videos to confirm the choice, without any label.\n"
            "Predict more videos, or choose by all of them with --confirm 0.",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, options, message):
    paths = [write_own(tmp_path / name, right_for(name[0])) for name in ("gru", "vlad")]

    assert refused(paths, **options) == message


def test_the_frontier_holds_what_fewer_bytes_would_buy(tmp_path):
    paths = [
        write_own(tmp_path / name, right_for(*name), size=size)
        for name, size in (("abc", 600), ("d", 200), ("c", 100), ("a", 250))
    ]

    selection = select(paths, output=tmp_path / "s.json", resamples=0, strategy="greedy")

    assert [step.added for step in selection.path] == ["abc", "d"]
    assert [(one.members, one.bytes) for one in selection.frontier] == [
        (("c",), 100),
        (("d",), 200),
        (("abc",), 600),
        (("abc", "d"), 800),
    ]
    gaps = [one.score for one in selection.frontier]
    assert gaps == sorted(set(gaps))
    singles = {one.name: one.score for one in selection.candidates}
    assert gaps[:3] == [singles["c"], singles["d"], singles["abc"]]
    assert selection.path[0].interval is None


def test_of_few_candidates_every_ensemble_is_measured(tmp_path):
    paths = [
        write_own(tmp_path / name, right_for(*name), size=size)
        for name, size in (("abd", 150), ("ab", 100), ("cd", 100))
    ]
    options = {"resamples": 0, "max_size": 200}

    exact = select(paths, output=tmp_path / "s.json", **options)
    greedy = select(paths, output=tmp_path / "g.json", strategy="greedy", **options)

    assert exact.search.strategy == "exhaustive"
    assert exact.search.evaluations == 4  # three alone, and one pair that fits
    assert [step.added for step in greedy.path] == ["abd"]  # nothing fits beside it
    assert {member.name for member in exact.members} == {"ab", "cd"}
    assert exact.score == exact.path[-1].score > greedy.score
    assert (exact.search.greedy_score, exact.search.greedy_path) == (greedy.score, ("abd",))


def test_of_many_candidates_the_choice_is_greedy(tmp_path):
    rows = np.random.default_rng(0).random((13, 4, 5))
    paths = [write_own(tmp_path / f"m{index:02d}", one) for index, one in enumerate(rows)]

    many = select(paths, output=tmp_path / "many.json", resamples=0)
    few = select(paths[:12], output=tmp_path / "few.json", resamples=0, max_members=2)
    by_bytes = select(paths[:3], output=tmp_path / "b.json", resamples=0, criterion="gain-per-byte")

    strategies = [each.search.strategy for each in (many, few, by_bytes)]
    assert strategies == ["greedy", "exhaustive", "greedy"]


def test_members_of_the_exact_best_are_listed_from_the_best_on(tmp_path):
    paths = [write_own(tmp_path / name, right_for(*name)) for name in ("c", "d", "ab")]

    selection = select(paths, output=tmp_path / "s.json", resamples=0)

    added = [step.added for step in selection.path]
    pairs = {
        name: select(
            paths, output=tmp_path / "p.json", resamples=0, start=[added[0], name], max_members=2,
            force=True,
        ).path[-1].score
        for name in added[1:]
    }  # fmt: skip
    assert added[0] == selection.candidates[0].name
    assert (added[1], selection.path[1].score) == max(pairs.items(), key=lambda pair: pair[1])
    assert set(added) == {"ab", "c", "d"}
    started = select(paths, output=tmp_path / "t.json", resamples=0, start=["c", "d"])
    assert [step.added for step in started.path] == ["c", "d", "ab"]
    assert started.score == pytest.approx(selection.score, abs=1e-12)


def test_optimised_coefficients_are_reported_with_what_they_brought(tmp_path):
    rows = [[[0.4, 0.1], [0.4, 0.3]], [[0.1, 0.5], [0.1, 0.5]]]
    paths = [
        write_own(tmp_path / name, one, ids=("a", "b"), positives=[{0}, {1}], names="vw")
        for name, one in zip("xy", rows, strict=True)
    ]

    selection = select(
        paths, output=tmp_path / "s.json", top_k=2, mixing="optimised", start=["x", "y"]
    )

    x, y = selection.members
    assert x.coefficient > 0.5 > y.coefficient
    assert x.coefficient + y.coefficient == pytest.approx(1)
    assert selection.path[-1].score == selection.optimised.uniform_score < selection.optimised.score
    assert selection.score == selection.optimised.score == 1
    assert selection.optimised.confirmed_score is None


def test_what_files_of_the_best_classes_could_change_is_told(tmp_path):
    rows = np.random.default_rng(0).random((4, 5)).round(3)
    paths = [write_own(tmp_path / name, one) for name, one in (("x", rows), ("y", rows**2))]
    with open_tensors(paths[1]) as file:
        metadata = file.metadata_as(PredictionsMetadata)
    write_predictions(
        paths[1],
        ids=VIDEOS,
        label_names=metadata.label_names,
        labels=LabelLists.from_lists(map(sorted, POSITIVES)),
        rows=rows**2,
        name="y",
        model=metadata.model,
        top_k=2,
        force=True,
    )

    selection = select(paths, output=tmp_path / "s.json", resamples=0, top_k=2)

    assert selection.truncation.candidates == ("y",)
    low, high = selection.truncation.score_bounds
    assert low <= selection.score <= high
    assert {one.name: one.top_k for one in selection.candidates} == {"x": None, "y": 2}
    by_gap = select(paths, output=tmp_path / "g.json", mixing="gap", resamples=0, top_k=2)
    assert by_gap.truncation.is_decided is None


METRICS = {"map": lambda scores: map_loops(scores, POSITIVES, 1),
           "macro-map": lambda scores: macro_map_loops(scores, POSITIVES)}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_members_may_be_chosen_by_mean_average_precision(tmp_path, metric):
    generator = np.random.default_rng(3)
    rows = {name: (generator.integers(0, 9, (4, 5)) / 8).tolist() for name in "pqrs"}
    paths = [write_own(tmp_path / name, each) for name, each in rows.items()]

    chosen = select(
        paths, output=tmp_path / "s.json", metric=metric, top_k=1, max_size=300, confirm=0.4
    )
    of_all = select(paths, output=tmp_path / "all.json", metric=metric, top_k=1, max_size=300)

    scores = {
        names: float(METRICS[metric](mixed_loops([rows[name] for name in names], [1] * len(names))))
        for size in range(1, 4)
        for names in combinations("pqrs", size)
    }
    members = tuple(sorted(member.name for member in of_all.members))
    assert of_all.score == pytest.approx(max(scores.values()), abs=1e-12)
    assert scores[members] == pytest.approx(of_all.score, abs=1e-12)
    assert {one.name: one.score for one in of_all.candidates} == pytest.approx(
        {name: scores[name,] for name in rows}, abs=1e-12
    )
    assert (of_all.metric, of_all.metric_name) == (
        metric, {"map": "mAP@1", "macro-map": "macro mAP"}[metric]
    )  # fmt: skip
    assert of_all.metric_name.split("@")[0] in of_all.rule
    assert "GAP" not in of_all.rule
    low, high = of_all.path[-1].interval
    assert low <= high
    assert chosen.score == pytest.approx(
        scores[tuple(sorted(member.name for member in chosen.members))], abs=1e-12
    )
    assert chosen.confirm.held_out.videos + chosen.confirm.chosen_by.videos == 4


@pytest.mark.parametrize("metric", METRICS)
def test_files_that_leave_out_classes_are_refused_by_another_metric_than_gap(tmp_path, metric):
    path = write_csv(tmp_path / "p.csv", [[MISSING, 0.5, 0.25, 0.5, 0.5]] * 4)
    labels = write_labels(tmp_path / "labels.csv")

    with pytest.raises(SelectionError) as caught:
        select([path], output=tmp_path / "s.json", metric=metric, labels_path=labels)

    name = {"map": "mAP", "macro-map": "macro mAP"}[metric]
    assert str(caught.value) == (
        f"{path} lists only some classes of each video, but {name} needs all.\n"
        "Predict again without --top-k into a .safetensors file, or select with --metric gap."
    )
    assert not (tmp_path / "s.json").exists()
