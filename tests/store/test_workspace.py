from contextlib import suppress

import pytest

from ensemble_kit.errors import CheckpointError, OutputError, TrainingError
from ensemble_kit.store.workspace import RunFolder, check_run_name, run_name


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "gru")


def test_checkpoints_sort_by_step(run):
    run.checkpoints.mkdir(parents=True)
    for step in (10_000, 300_000, 20, 9, 12_345_678):
        run.checkpoint(step).touch()
    (run.checkpoints / ".step-00000001.safetensors.part").touch()

    steps = [int(path.stem.removeprefix("step-")) for path in run.checkpoint_paths()]
    assert steps == [9, 20, 10_000, 300_000, 12_345_678]


def test_a_folder_without_checkpoints_is_refused(run):
    with pytest.raises(CheckpointError) as caught:
        run.checkpoint_paths()

    assert str(caught.value) == (
        f"{run.path} holds no checkpoints (checkpoints/step-*.safetensors).\n"
        "Name the folder of a run that `ensemble-kit train` has made."
    )


@pytest.mark.parametrize("name", ["state", "metrics", "ema", "averaged", "validation"])
def test_any_output_of_a_run_keeps_another_from_it(run, name):
    output = getattr(run, name)
    output.parent.mkdir(parents=True)
    output.touch()

    with pytest.raises(OutputError) as caught:
        run.claim(force=False)
    assert str(caught.value) == (
        f"{run.path} holds a run already ({output.name}).\n"
        "Give this run another --name, or replace the old one with --force."
    )

    run.claim(force=True)
    assert list(run.path.iterdir()) == []


def test_a_lock_under_which_nothing_was_written_leaves_nothing(run, tmp_path):
    with suppress(ValueError), run.locked():
        assert run.is_locked()
        raise ValueError("a recipe that is refused")

    assert list(tmp_path.iterdir()) == []


def test_a_lock_leaves_what_was_there_or_has_been_written(tmp_path):
    kept, begun = (RunFolder(tmp_path / name) for name in ("kept", "begun"))
    kept.path.mkdir()
    (kept.path / "notes.txt").touch()

    with kept.locked():
        pass
    with begun.locked():
        begun.metrics.touch()

    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "begun", "begun/.lock", "begun/metrics.jsonl", "kept", "kept/notes.txt"
    ]  # fmt: skip


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "runs").touch()

    with pytest.raises(OutputError) as caught, RunFolder(tmp_path / "runs" / "gru").locked():
        pass

    assert str(caught.value) == (
        f"{tmp_path}/runs/gru cannot be written: Not a directory.\nName a folder you may write to."
    )


@pytest.mark.parametrize(
    ("recipe", "name"), [("willow/gru", "willow-gru"), ("my recipe.v2", "my-recipe-v2")]
)
def test_a_recipes_name_becomes_one_that_a_run_can_have(recipe, name):
    assert run_name(recipe) == name
    check_run_name(name)


@pytest.mark.parametrize("name", ["", "-gru", "a/b", "a.b", "gru\n", ".", "..", "../x"])
def test_a_name_that_cannot_name_a_run_is_refused(name):
    with pytest.raises(TrainingError) as caught:
        check_run_name(name)

    assert str(caught.value) == (
        f"{name!r} cannot name a run.\n"
        "Use at most 200 letters, digits, _ and -, and do not begin with -."
    )


def test_a_name_too_long_for_a_folder_is_refused_and_cut():
    check_run_name("a" * 200)
    with pytest.raises(TrainingError) as caught:
        check_run_name("a" * 201)

    assert str(caught.value) == (
        f"'{'a' * 20}...' cannot name a run.\n"
        "Use at most 200 letters, digits, _ and -, and do not begin with -."
    )
