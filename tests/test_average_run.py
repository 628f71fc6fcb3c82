"""What averaging takes from the folder of a run."""

import json

import pytest
from builders import (
    metadata_of,
    rewrite_checkpoint,
    tiny_recipe,
    tiny_records,
    write_checkpoint,
)

from ensemble_kit.averaging import stage as averaging
from ensemble_kit.data.dataset import Records
from ensemble_kit.errors import CheckpointError
from ensemble_kit.networks.loading import load
from ensemble_kit.pipeline import average_run
from ensemble_kit.store.workspace import RunFolder

STEPS = (2, 4, 6, 8)
LOGGED = {2: 0.9, 4: 0.1, 6: 0.2, 8: 0.3}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def run(tmp_path, records):
    """A run of four checkpoints whose recipe averages the last two, measured on validation."""
    training, validation = records
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    for step in STEPS:
        write_checkpoint(run.checkpoint(step), tiny_recipe(), training.schema, seed=step,
                         step=step, training_files=training.patterns)  # fmt: skip
        rewrite_checkpoint(run.checkpoint(step), validation_files=validation.patterns)
    lines = [{"step": 1, "loss": 2.5}]
    lines += [{"step": step, "validation": {"gap": gap}} for step, gap in LOGGED.items()]
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return run


@pytest.fixture
def measured(monkeypatch):
    """The single checkpoints that were measured again."""
    paths = []
    monkeypatch.setattr(averaging, "load", lambda path, device: paths.append(path) or load(path))
    return paths


def test_logged_gaps_are_taken_and_all_checkpoints_left_count(run, measured):
    outcome = average_run(run, run.averaged)

    assert outcome.used == (run.checkpoint(6), run.checkpoint(8))
    assert (outcome.best, outcome.best_gap) == (run.checkpoint(2), 0.9)
    assert outcome.path is None
    assert not run.averaged.exists()
    assert measured == []


def test_a_checkpoint_that_training_has_removed_does_not_count(run, measured):
    run.checkpoint(2).unlink()
    run.checkpoint(4).unlink()

    outcome = average_run(run, run.averaged, last=4)

    assert outcome.used == (run.checkpoint(6), run.checkpoint(8))
    assert (outcome.best, outcome.best_gap) == (run.checkpoint(8), 0.3)
    assert outcome.path == run.averaged
    assert measured == []


def test_of_a_step_logged_twice_the_later_line_counts_and_half_a_line_does_not(run, measured):
    with run.metrics.open("a") as log:
        log.write('{"step": 8, "validation": {"gap": 0.95}}\n{"step": 8, "valida')

    outcome = average_run(run, run.averaged)

    assert (outcome.best, outcome.best_gap) == (run.checkpoint(8), 0.95)
    assert measured == []


def test_without_a_log_those_that_are_averaged_are_measured(run, measured, records):
    run.metrics.unlink()

    outcome = average_run(run, run.averaged, last=3, even_if_worse=True)

    assert measured == [run.checkpoint(step) for step in (4, 6, 8)] == list(outcome.used)
    assert outcome.gap == load(run.averaged).measure(records[1]).gap


def test_on_other_records_the_log_says_nothing(run, measured, records):
    average_run(run, run.averaged, validation=records[0], even_if_worse=True)

    assert measured == [run.checkpoint(6), run.checkpoint(8)]


def test_the_same_records_named_again_are_those_of_the_log(run, measured, records):
    validation = Records(records[1].patterns)

    outcome = average_run(run, run.averaged, validation=validation)

    assert outcome.best == run.checkpoint(2)
    assert measured == []


def test_greedy_goes_through_all_checkpoints_that_are_left(run):
    outcome = average_run(run, run.averaged, method="greedy")

    assert [step.path for step in outcome.steps] == [run.checkpoint(n) for n in (2, 8, 6, 4)]

    outcome = average_run(run, run.averaged, method="greedy", last=2, force=True)

    assert [step.path for step in outcome.steps] == [run.checkpoint(n) for n in (8, 6)]


def test_the_moving_average_that_training_kept_is_compared_with_the_log(run, measured, records):
    write_checkpoint(run.ema, tiny_recipe(), records[0].schema, seed=5, step=8,
                     training_files=records[0].patterns)  # fmt: skip
    rewrite_checkpoint(run.ema, ema_decay=0.9, validation_files=records[1].patterns)

    outcome = average_run(run, run.averaged, method="ema", batch_norm="last", even_if_worse=True)

    assert outcome.used == (run.ema,)
    assert (outcome.best, outcome.best_gap) == (run.checkpoint(2), 0.9)
    assert [parent.path for parent in metadata_of(run.averaged).averaged_from] == [
        "ema.safetensors",
        "checkpoints/step-00000008.safetensors",
    ]
    assert measured == []


def test_a_run_without_a_moving_average_is_named(run):
    with pytest.raises(CheckpointError) as caught:
        average_run(run, run.averaged, method="ema")

    assert str(caught.value) == (
        f"{run.path} holds no exponential moving average (ema.safetensors).\n"
        "Train with --ema 0.999, or average with another --method."
    )
