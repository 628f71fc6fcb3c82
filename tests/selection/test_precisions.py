"""Candidates that stand in several precisions, against all ensembles measured one by one."""

from itertools import product

import numpy as np
import pytest
from builders import bytes_by_dtype
from reference import gap_loops, mixed_loops

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import SelectionError
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.selection.stage import find_predictions, select
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata

NUM_VIDEOS, NUM_CLASSES, SHARED = 12, 5, 7
LABELS = [{index % NUM_CLASSES, (3 * index + 1) % NUM_CLASSES} for index in range(NUM_VIDEOS)]
SIZES = {"gru": 100, "vlad": 160, "bag": 80}  # in bf16
DTYPES = ("bf16", "int8", "int4")


def write(folder, name, dtype, rows, *, path=None):
    """Write predictions of a model that was run in a precision."""
    path = path or folder / f"{name}-{dtype}.safetensors"
    write_predictions(
        path,
        ids=[f"video{index}" for index in range(NUM_VIDEOS)],
        label_names=tuple("vwxyz"),
        labels=LabelLists.from_lists(map(sorted, LABELS)),
        rows=rows,
        name=name,
        model=ModelMetadata(
            file=FileMetadata(path=f"{name}/averaged.safetensors", sha256=f"{len(name):064d}"),
            kind="checkpoint",
            num_values=SIZES[name] // 2,
            bytes_by_dtype=bytes_by_dtype(SIZES[name]),
            shared_bytes=SHARED,
            dtype=dtype,
            repeats=1,
        ),
        force=False,
    )
    return path


@pytest.fixture
def rows():
    rng = np.random.default_rng(3)
    hits = np.array([[index in labels for index in range(NUM_CLASSES)] for labels in LABELS])
    return {
        (name, dtype): (0.3 * hits + 0.7 * rng.random(hits.shape)).astype(np.float32)
        for name, dtype in product(SIZES, DTYPES)
    }


@pytest.fixture
def files(rows, tmp_path):
    return [
        write(tmp_path, name, None if dtype == "bf16" else dtype, scores)
        for (name, dtype), scores in rows.items()
    ]


def every_ensemble(rows, limit):
    """Return GAP, bytes and members of each ensemble that fits, of one precision each at most."""
    for chosen in product((None, *DTYPES), repeat=len(SIZES)):
        members = [(name, dtype) for name, dtype in zip(SIZES, chosen, strict=True) if dtype]
        size = SHARED + sum(bytes_by_dtype(SIZES[name])[dtype] for name, dtype in members)
        if members and size <= limit:
            scores = [rows[member].astype(float).tolist() for member in members]
            mean = mixed_loops(scores, [1 / len(members)] * len(members))
            yield gap_loops(mean, LABELS, k=20), size, members


def test_the_best_of_all_precisions_is_chosen_under_each_limit(rows, files, tmp_path):
    seen = set()
    for limit in (50, 100, 140, 200, 260, 1000):
        best, _, members = max(every_ensemble(rows, limit), key=lambda each: (each[0], -each[1]))

        selection = select(
            files, output=tmp_path / "s.json", dtype="auto", max_size=limit, resamples=0, force=True
        )

        assert selection.search.strategy == "exhaustive"
        assert selection.path[-1].score == pytest.approx(best, abs=1e-12)
        assert {(each.name, each.dtype) for each in selection.members} == set(members)
        assert selection.bytes <= limit
        seen.add(frozenset(members))
    assert len(seen) > 2


def test_the_frontier_names_the_precision_at_each_point(rows, files, tmp_path):
    selection = select(files, output=tmp_path / "s.json", dtype="auto", resamples=0)

    for point in selection.frontier:
        known = {size: gap for gap, size, _ in sorted(every_ensemble(rows, point.bytes))}
        assert point.score == pytest.approx(max(known.values()), abs=1e-12)
        sizes = zip(point.members, point.dtypes, strict=True)
        counted = (bytes_by_dtype(SIZES[name])[dtype] for name, dtype in sizes)
        assert point.bytes == SHARED + sum(counted)
    assert set(selection.frontiers) == set(DTYPES)
    for dtype, frontier in selection.frontiers.items():
        assert frontier
        assert {each for point in frontier for each in point.dtypes} == {dtype}
        of_all = [point.score for point in selection.frontier if point.bytes <= frontier[-1].bytes]
        assert max(of_all) >= frontier[-1].score


@pytest.mark.parametrize("strategy", ["greedy", "beam", "replacement"])
def test_other_strategies_are_never_worse_than_with_one_precision(strategy, files, tmp_path):
    options = {"strategy": strategy, "resamples": 0, "force": True, "output": tmp_path / "s.json"}
    for limit in (100, 140, 200):
        free = select(files, dtype="auto", max_size=limit, **options)
        names = [member.name for member in free.members]
        assert len(set(names)) == len(names)
        for dtype, alone in (("bf16", files[0::3]), ("int8", files[1::3]), ("int4", files[2::3])):
            one = select(alone, dtype=dtype, max_size=limit, **options)
            assert free.path[-1].score >= one.path[-1].score - 1e-12


def test_a_list_needs_each_candidate_in_each_precision(files, tmp_path):
    select(files, output=tmp_path / "s.json", dtype=("bf16", "int8", "int4"))

    with pytest.raises(SelectionError) as caught:
        select(files[:5], output=tmp_path / "t.json", dtype=DTYPES)

    assert str(caught.value) == (
        f"vlad is to be selected in int4, but {files[3]} was measured in the precision of its "
        f"checkpoint.\nMeasure it with `ensemble-kit predict --dtype int4 "
        f"{tmp_path / 'vlad/averaged.safetensors'} DATA -o FILE`, and name that file too."
    )
    assert not (tmp_path / "t.json").exists()


def test_predictions_of_a_precision_that_is_not_asked_for_are_refused(files, tmp_path):
    with pytest.raises(SelectionError) as caught:
        select(files[:2], output=tmp_path / "s.json", dtype="bf16")

    assert str(caught.value) == (
        f"{files[1]} was measured in int8, which is none of bf16.\n"
        "Leave it out, or name its precision with --dtype."
    )


def test_two_files_of_one_member_in_one_precision_are_refused(rows, files, tmp_path):
    again = write(tmp_path, "gru", "int8", rows["gru", "int8"], path=tmp_path / "again")

    with pytest.raises(SelectionError) as caught:
        select([*files, again], output=tmp_path / "s.json", dtype="auto")

    assert str(caught.value).startswith(f"{files[1]} and {again} are both named 'gru'.")


def test_a_member_to_start_with_must_have_one_precision(files, tmp_path):
    with pytest.raises(SelectionError) as caught:
        select(files, output=tmp_path / "s.json", dtype="auto", start=["gru"])

    assert str(caught.value) == (
        "'gru' is a member to start with, but stands in several precisions.\n"
        "Name one precision with --dtype."
    )


def test_a_workspace_is_searched_for_the_precisions_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "gru").mkdir(parents=True)
    for name in ("validation", "validation-int8", "validation-int4"):
        (tmp_path / "runs" / "gru" / f"{name}.safetensors").touch()

    assert [path.stem for path in find_predictions("auto")] == [
        "validation", "validation-int8", "validation-int4"
    ]  # fmt: skip
    assert [path.stem for path in find_predictions("bf16")] == ["validation"]
    assert [path.stem for path in find_predictions(("int4",))] == ["validation-int4"]
    (tmp_path / "runs" / "gru" / "validation-int8.safetensors").unlink()
    with pytest.raises(SelectionError, match="train --predict-dtype int8"):
        find_predictions("int8")
