"""Averages that have to be at least as good as the best checkpoint alone."""

import os
from itertools import permutations

import pytest
import torch
from builders import (
    contents_of,
    metadata_of,
    rewrite_checkpoint,
    tiny_recipe,
    tiny_records,
    tiny_schema,
    write_checkpoint,
)

from ensemble_kit.averaging import stage as averaging
from ensemble_kit.averaging.stage import GreedyStep, average_checkpoints
from ensemble_kit.errors import AveragingError, CheckpointError, PredictionsError
from ensemble_kit.files import sha256_of
from ensemble_kit.networks.loading import load

RULES = ["recalibrate", "average", "last"]
DECAY = 0.9


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def validation(records):
    return records[1]


def write_run(folder, records, *, seeds=(4, 5, 6, 7)):
    """Write checkpoints of one run: made-up models, whose GAPs are far apart."""
    paths = []
    for step, seed in enumerate(seeds, start=1):
        paths.append(folder / f"step-{step}.safetensors")
        write_checkpoint(paths[-1], tiny_recipe(), records[0].schema, seed=seed, step=step,
                         training_files=records[0].patterns)  # fmt: skip
    return paths


@pytest.fixture
def checkpoints(tmp_path, records):
    return write_run(tmp_path, records)


@pytest.fixture
def output(tmp_path):
    return tmp_path / "averaged.safetensors"


@pytest.fixture
def moving(tmp_path, records):
    """An exponential moving average of the run of ``checkpoints``, at step 4."""
    path = tmp_path / "ema.safetensors"
    write_checkpoint(path, tiny_recipe(), records[0].schema, seed=8, step=4,
                     training_files=records[0].patterns)  # fmt: skip
    rewrite_checkpoint(path, ema_decay=DECAY)
    return path


def gap_of(path, validation):
    return load(path).measure(validation).gap


def message_of(error, paths, output, **options):
    with pytest.raises(error) as caught:
        average_checkpoints(paths, output, **options)
    assert not output.exists()
    return str(caught.value)


@pytest.mark.parametrize("batch_norm", RULES)
def test_the_gaps_are_those_of_the_files(batch_norm, checkpoints, output, validation):
    outcome = average_checkpoints(
        checkpoints, output, batch_norm=batch_norm, validation=validation, even_if_worse=True
    )

    gaps = {path: gap_of(path, validation) for path in checkpoints}
    assert outcome.path == output
    assert outcome.used == tuple(checkpoints)
    assert outcome.gap == gap_of(output, validation)
    assert outcome.best_gap == max(gaps.values())
    assert outcome.best == max(gaps, key=gaps.get)
    assert outcome.is_better == (outcome.gap >= outcome.best_gap)
    assert metadata_of(output).batch_norm == batch_norm
    assert metadata_of(output).validation_gap == outcome.gap


def test_comparing_changes_nothing_in_the_file_but_the_gap(
    checkpoints, output, validation, tmp_path
):
    plain = tmp_path / "plain.safetensors"
    for batch_norm in RULES:
        average_checkpoints(checkpoints, plain, batch_norm=batch_norm, force=True)

        average_checkpoints(checkpoints, output, batch_norm=batch_norm, validation=validation,
                            even_if_worse=True, force=True)  # fmt: skip

        assert metadata_of(plain).validation_gap is None
        rewrite_checkpoint(output, validation_gap=None)
        assert output.read_bytes() == plain.read_bytes(), batch_norm


def test_an_average_that_loses_is_not_written_unless_asked_for(checkpoints, output, validation):
    options = {"validation": validation, "known_gaps": {checkpoints[2]: 0.99}}
    output.write_bytes(b"old")

    lost = average_checkpoints(checkpoints, output, force=True, **options)

    assert (lost.path, lost.is_better) == (None, False)
    assert (lost.best, lost.best_gap) == (checkpoints[2], 0.99)
    assert output.read_bytes() == b"old"
    with pytest.raises(AveragingError) as caught:
        lost.require_written()
    assert str(caught.value) == (
        f"The mean of 4 checkpoints has a validation GAP@20 of {lost.gap:.5f}, but "
        f"{checkpoints[2]} alone has 0.99000; nothing was written.\n"
        "Use that checkpoint, or write the average anyway with --even-if-worse."
    )

    kept = average_checkpoints(checkpoints, output, force=True, even_if_worse=True, **options)

    assert (kept.path, kept.is_better, kept.gap) == (output, False, lost.gap)
    kept.require_written()
    assert metadata_of(output).averaged_from


def test_an_average_as_good_as_the_best_is_written(checkpoints, output, validation):
    outcome = average_checkpoints(
        checkpoints[:1], output, batch_norm="average", validation=validation
    )

    assert outcome.gap == outcome.best_gap
    assert outcome.is_better
    assert output.exists()


def test_gaps_that_are_known_are_not_measured_again(checkpoints, output, validation, monkeypatch):
    measured = []
    monkeypatch.setattr(averaging, "load", lambda path, device: measured.append(path) or load(path))
    elsewhere = output.with_name("step-0.safetensors")
    known = {checkpoints[0]: 0.3, checkpoints[3]: 0.1, elsewhere: 0.4}

    outcome = average_checkpoints(
        checkpoints[:2], output, validation=validation, known_gaps=known, even_if_worse=True
    )

    assert measured == [checkpoints[1]]
    expected = known | {checkpoints[1]: gap_of(checkpoints[1], validation)}
    assert outcome.best_gap == max(expected.values())
    assert outcome.used == (checkpoints[0], checkpoints[1])


def test_a_better_checkpoint_that_was_not_averaged_counts_too(checkpoints, output, validation):
    elsewhere = output.with_name("step-0.safetensors")

    outcome = average_checkpoints(
        checkpoints[:2], output, validation=validation, known_gaps={elsewhere: 0.99}
    )

    assert (outcome.path, outcome.best, outcome.best_gap) == (None, elsewhere, 0.99)


def test_the_records_that_training_validated_on_are_found(checkpoints, output, validation):
    rewrite_checkpoint(checkpoints[3], validation_files=validation.patterns)

    outcome = average_checkpoints(checkpoints, output, even_if_worse=True)

    assert outcome.gap == gap_of(output, validation)
    assert metadata_of(output).validation_files == validation.patterns


def test_without_them_nothing_is_compared(checkpoints, output, tmp_path):
    rewrite_checkpoint(checkpoints[3], validation_files=(str(tmp_path / "gone"),))

    outcome = average_checkpoints(checkpoints, output, known_gaps={checkpoints[0]: 0.99})

    assert outcome.path == output
    assert (outcome.gap, outcome.best, outcome.best_gap, outcome.is_better) == (None,) * 4


def test_validation_records_that_do_not_fit_are_refused(tmp_path, output, validation):
    path = tmp_path / "step-2.safetensors"
    write_checkpoint(path, tiny_recipe(), tiny_schema())

    assert message_of(
        PredictionsError, [path], output, batch_norm="last", validation=validation
    ) == (
        f"{path} has rgb (5 float32), audio (3 float32), but these records have rgb (8 uint8), "
        "audio (4 uint8).\nUse records with the same modalities, widths and value types."
    )


def greedy_by_the_book(paths, validation, batch_norm, folder):
    """Recipe 1 of model soups, from files alone; return the steps and the set."""
    trial = folder / "trial.safetensors"
    gaps = {path: gap_of(path, validation) for path in paths}
    ranked = sorted(paths, key=lambda path: -gaps[path])
    chosen, best = [ranked[0]], gaps[ranked[0]]
    steps = [GreedyStep(ranked[0], best, is_added=True)]
    for path in ranked[1:]:
        average_checkpoints([*chosen, path], trial, batch_norm=batch_norm, force=True)
        gap = gap_of(trial, validation)
        steps.append(GreedyStep(path, gap, is_added=gap > best))
        if gap > best:
            chosen, best = [*chosen, path], gap
    return tuple(steps), sorted(chosen), best


@pytest.mark.parametrize("batch_norm", RULES)
def test_greedy_adds_what_raises_the_gap(batch_norm, checkpoints, output, validation, tmp_path):
    steps, chosen, gap = greedy_by_the_book(checkpoints, validation, batch_norm, tmp_path)

    outcome = average_checkpoints(
        checkpoints, output, method="greedy", batch_norm=batch_norm, validation=validation
    )

    assert outcome.steps == steps
    assert outcome.used == tuple(chosen)
    assert outcome.gap == gap == gap_of(output, validation)
    assert {step.is_added for step in steps[1:]} == {True, False}
    expected = tmp_path / "expected.safetensors"
    average_checkpoints(chosen, expected, batch_norm=batch_norm)
    rewrite_checkpoint(expected, validation_gap=gap)
    assert output.read_bytes() == expected.read_bytes()


def test_greedy_is_never_worse_than_the_best_checkpoint(records, validation, tmp_path):
    sizes = set()
    for first in range(0, 24, 4):
        folder = tmp_path / str(first)
        paths = write_run(folder, records, seeds=range(first, first + 4))

        outcome = average_checkpoints(
            paths, folder / "averaged.safetensors", method="greedy", validation=validation
        )

        sizes.add(len(outcome.used))
        assert outcome.path is not None
        assert outcome.is_better
        assert outcome.gap >= max(gap_of(path, validation) for path in paths)
        assert outcome.gap == gap_of(outcome.path, validation)
    assert {1, 3} <= sizes


def test_greedy_keeps_a_checkpoint_that_is_best_alone_as_it_is(checkpoints, output, validation):
    best = checkpoints[3]
    known = {path: 0.98 + 0.01 * (path == best) for path in checkpoints}

    outcome = average_checkpoints(
        checkpoints, output, method="greedy", validation=validation, known_gaps=known
    )

    assert (outcome.used, outcome.gap, outcome.is_better) == ((best,), 0.99, True)
    assert outcome.batch_norm == metadata_of(output).batch_norm == "trained"
    assert all(map(torch.equal, contents_of(output).values(), contents_of(best).values()))


def test_of_equal_checkpoints_greedy_tries_the_earlier_first(checkpoints, output, validation):
    outcome = average_checkpoints(
        checkpoints[::-1], output, method="greedy", validation=validation,
        known_gaps=dict.fromkeys(checkpoints, 0.99),
    )  # fmt: skip

    assert [step.path for step in outcome.steps] == checkpoints
    assert outcome.best == checkpoints[0]


def test_greedy_leaves_out_what_changes_nothing(checkpoints, output, validation):
    rewrite_checkpoint(checkpoints[0], contents_of(checkpoints[1]))

    outcome = average_checkpoints(
        checkpoints[:2], output, method="greedy", batch_norm="average", validation=validation
    )

    assert outcome.used == (checkpoints[0],)
    assert outcome.steps[1] == GreedyStep(checkpoints[1], outcome.gap, is_added=False)


def test_the_order_of_the_files_changes_nothing_in_a_greedy_average(
    checkpoints, output, validation
):
    outcomes, files = [], []
    for paths in list(permutations(checkpoints))[::5]:
        outcomes.append(
            average_checkpoints(paths, output, method="greedy", batch_norm="average",
                                validation=validation, force=True)
        )  # fmt: skip
        files.append(output.read_bytes())

    assert len(set(outcomes)) == len(set(files)) == 1
    assert len(outcomes) == 5


def test_greedy_may_lose_to_a_checkpoint_it_could_not_choose(checkpoints, output, validation):
    outcome = average_checkpoints(
        checkpoints, output, method="greedy", validation=validation,
        known_gaps={output.with_name("step-0.safetensors"): 0.99},
    )  # fmt: skip

    assert (outcome.path, outcome.is_better) == (None, False)
    assert not output.exists()


def test_greedy_needs_validation_records(checkpoints, output):
    assert message_of(AveragingError, checkpoints, output, method="greedy") == (
        f"{checkpoints[3]} names no validation records that exist, and greedy averaging needs "
        "some.\nName validation records with --validation, or use --method uniform."
    )


def test_a_moving_average_has_its_own_weights_and_statistics_by_the_rule(
    checkpoints, moving, output, tmp_path
):
    own, newest = contents_of(moving), contents_of(checkpoints[3])
    plain = tmp_path / "plain.safetensors"
    for batch_norm in RULES:
        outcome = average_checkpoints(
            [*checkpoints, moving], output, method="ema", batch_norm=batch_norm, force=True
        )

        assert outcome.used == (moving,)
        assert outcome.description == "the exponential moving average"
        metadata = metadata_of(output)
        assert (metadata.ema_decay, metadata.step, metadata.batch_norm) == (DECAY, 4, batch_norm)
        parents = [moving, checkpoints[3]] if batch_norm == "last" else [moving]
        assert [parent.path for parent in metadata.averaged_from] == [p.name for p in parents]
        assert [parent.sha256 for parent in metadata.averaged_from] == list(map(sha256_of, parents))
        changed = {name for name, t in contents_of(output).items() if not torch.equal(t, own[name])}
        assert all("running_" in name for name in changed)
        assert bool(changed) == (batch_norm != "average")
        if batch_norm == "last":
            assert all(torch.equal(contents_of(output)[name], newest[name]) for name in changed)
        if batch_norm == "recalibrate":
            rewrite_checkpoint(moving, ema_decay=None)  # as a mean of one checkpoint
            average_checkpoints([moving], plain)
            rewrite_checkpoint(moving, ema_decay=DECAY)
            assert all(map(torch.equal, contents_of(output).values(), contents_of(plain).values()))


def test_a_moving_average_is_compared_with_the_others(checkpoints, moving, output, validation):
    outcome = average_checkpoints([moving, checkpoints[1]], output, method="ema",
                                  validation=validation, even_if_worse=True)  # fmt: skip

    assert outcome.gap == gap_of(output, validation)
    assert (outcome.best, outcome.best_gap) == (checkpoints[1], gap_of(checkpoints[1], validation))

    alone = average_checkpoints([moving], output, method="ema", validation=validation, force=True)

    assert alone.gap == outcome.gap
    assert (alone.path, alone.best, alone.is_better) == (output, None, None)


def test_a_moving_average_that_loses_is_named_so(checkpoints, moving, output, validation):
    lost = average_checkpoints(
        [moving, checkpoints[0]], output, method="ema", validation=validation,
        known_gaps={checkpoints[0]: 0.99},
    )  # fmt: skip

    with pytest.raises(AveragingError) as caught:
        lost.require_written()
    assert str(caught.value).startswith("The exponential moving average has a validation GAP@20 of")
    assert not output.exists()


def test_a_moving_average_is_no_checkpoint_of_a_step(checkpoints, moving, output):
    for method in ("uniform", "greedy"):
        assert message_of(CheckpointError, [*checkpoints, moving], output, method=method) == (
            f"{moving} is an exponential moving average.\n"
            "Use it with --method ema, or name checkpoints of single steps."
        )


def test_one_moving_average_is_wanted(checkpoints, moving, output, tmp_path):
    again = tmp_path / "again.safetensors"
    os.link(moving, again)

    for paths, found in ((checkpoints, 0), ([moving, again], 2)):
        assert message_of(CheckpointError, paths, output, method="ema") == (
            f"--method ema needs one exponential moving average; {found} were named.\n"
            "Name the ema.safetensors of one run."
        )


def test_statistics_of_the_last_step_are_not_in_a_moving_average(moving, output):
    assert message_of(CheckpointError, [moving], output, method="ema", batch_norm="last") == (
        f"{moving} holds averages of statistics, not those of the last step.\n"
        "Name the last checkpoint of its run too, or use another --batch-norm."
    )
