import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import interrupt_after, lines_of, tiny_recipe, tiny_records, train_tiny

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.tfrecord import read_records, write_records
from ensemble_kit.errors import OutputError, TrainingError
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.store import tensor_files as checkpoints
from ensemble_kit.store.provenance import TrainingStateMetadata
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.training import gradients, loop
from ensemble_kit.training.state import seed_step

TESTS = Path(__file__).resolve().parents[1]
OPTIONS = [
    "training.balance=0.5",
    "training.mixup=0.5",
    "training.label_smoothing=0.1",
    "training.learning_rate_factors.pooling=0.5",
]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return tiny_records(tmp_path_factory.mktemp("records"))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "tiny"


def bytes_of(run):
    return [path.read_bytes() for path in run.checkpoint_paths()]


def state_of(run):
    with open_tensors(run.state) as file:
        return file.metadata_as(TrainingStateMetadata), set(file.specs)


def test_a_run_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path):
    result = subprocess.run(
        [sys.executable, TESTS / "training" / "killed.py", tmp_path, "12"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"},
    )

    assert result.returncode == 0, result.stderr
    said = re.fullmatch(r"(\d+) kills\n", result.stdout)
    assert said, result.stdout
    assert int(said[1]) >= 12


@pytest.mark.parametrize(
    ("pooling", "overrides"), [("gru", []), ("soft_bof", OPTIONS)], ids=["papers", "options"]
)
def test_an_interrupted_run_ends_with_the_checkpoints_of_one_that_was_not(
    pooling, overrides, folder, records, monkeypatch, tmp_path
):
    recipe = tiny_recipe(max_steps=5, pooling=pooling, overrides=overrides)
    whole = train_tiny(tmp_path / "whole" / "tiny", records, recipe, is_validated=True)
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        stopped = train_tiny(folder, records, recipe, is_validated=True)

    trained = train_tiny(folder, records, recipe, is_validated=True)

    assert (stopped.steps, stopped.is_stopped) == (3, True)
    assert (trained.steps, trained.is_stopped, trained.best_gap) == (5, False, whole.best_gap)
    assert trained.seconds > stopped.seconds
    assert bytes_of(trained.folder) == bytes_of(whole.folder)  # hence not that of step 3
    assert [(line["step"], line.get("state")) for line in lines_of(trained)] == [
        (1, None),
        (2, None),
        (3, "stopped"),
        (4, None),
        (5, None),
        (5, "finished"),
    ]


def test_an_interrupt_while_a_checkpoint_is_measured_leaves_that_for_later(
    folder, records, monkeypatch, tmp_path
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    whole = train_tiny(tmp_path / "whole" / "tiny", records, is_validated=True)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "measure_together", interrupt)
        stopped = train_tiny(folder, records, is_validated=True)

    trained = train_tiny(folder, records, is_validated=True)

    assert (stopped.steps, stopped.best_gap) == (2, None)
    assert bytes_of(trained.folder) == bytes_of(whole.folder)
    assert state_of(trained.folder)[0].measured == state_of(whole.folder)[0].measured


def test_ctrl_c_waits_until_a_step_is_whole(folder, records, monkeypatch):
    whole = gradients.cross_entropy

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*arguments)

    monkeypatch.setattr(gradients, "cross_entropy", interrupted)

    stopped = train_tiny(folder, records)

    assert (stopped.steps, stopped.is_stopped) == (1, True)
    metadata, names = state_of(stopped.folder)
    assert (metadata.step, metadata.batches, metadata.examples) == (1, 1, 16)
    assert "adam.exp_avg.head.gates.weight" in names


def test_a_finished_run_is_left_as_it_is(folder, records):
    trained = train_tiny(folder, records, is_validated=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")}

    again = train_tiny(folder, records, is_validated=True)

    assert (again.was_finished, trained.was_finished) == (True, False)
    assert (again.steps, again.best_gap) == (6, trained.best_gap)
    assert again.seconds == pytest.approx(trained.seconds, abs=0.5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*")} == before


def test_the_state_of_a_finished_run_has_no_tensors(folder, records):
    metadata, names = state_of(train_tiny(folder, records).folder)

    assert metadata.is_finished
    assert names == set()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"recipe": tiny_recipe(max_steps=7), "ema": 0.9}, "recipe, --ema"),
        ({"is_validated": True, "accumulate": 2}, "validation records, --accumulate"),
    ],
)
def test_another_run_is_not_gone_on_with(change, what, folder, records):
    before = bytes_of(train_tiny(folder, records).folder)

    with pytest.raises(OutputError) as caught:
        train_tiny(folder, records, **change)

    assert str(caught.value) == (
        f"{folder} holds a run with other values of: {what}.\n"
        "Give this run another --name, or replace the old one with --force."
    )
    assert bytes_of(train_tiny(folder, records).folder) == before


def test_force_starts_over(folder, records, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        train_tiny(folder, records)

    trained = train_tiny(folder, records, force=True)

    assert [line["step"] for line in lines_of(trained)] == [1, 6]


def rewritten(path, change):
    """Replace a file of records by as many bytes, and give it back its time of modification."""
    times = path.stat()
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size


def swap_records(path):
    first, second, *rest = [bytes(record) for record in read_records(path)]
    write_records(path, [second, first, *rest], force=True)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 0x40  # in the last record's payload
    path.write_bytes(content)


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("which", ["training", "validation"])
def test_records_that_changed_at_the_same_size_and_time_make_another_run(
    is_finished, which, folder, tmp_path, monkeypatch
):
    records = tiny_records(tmp_path / "records")
    with monkeypatch.context() as patched:
        if not is_finished:
            interrupt_after(patched, 3)
        train_tiny(folder, records, is_validated=True)
    training, validation = records
    rewritten({"training": training, "validation": validation}[which].paths[1], swap_records)

    with pytest.raises(OutputError) as caught:
        train_tiny(folder, reopened(records), is_validated=True)

    assert str(caught.value) == (
        f"{folder} holds a run with other values of: {which} records.\n"
        "Give this run another --name, or replace the old one with --force."
    )


def reopened(records):
    return tuple(Records(each.patterns) for each in records)


@pytest.mark.parametrize("which", ["training", "validation"])
def test_a_payload_that_changed_under_its_checksum_makes_another_run(which, folder, tmp_path):
    records = tiny_records(tmp_path / "records")
    train_tiny(folder, records, is_validated=True)
    flip_a_bit(records[which == "validation"].paths[1])

    with pytest.raises(OutputError) as caught:
        train_tiny(folder, reopened(records), is_validated=True)

    assert caught.value.problem == f"{folder} holds a run with other values of: {which} records."


def test_records_that_were_only_copied_or_touched_are_the_same_run(folder, tmp_path):
    records = tiny_records(tmp_path / "records")
    train_tiny(folder, records, is_validated=True)
    for path in records[0].paths:
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))

    assert train_tiny(folder, reopened(records), is_validated=True).was_finished


def test_a_teacher_counts_by_its_content(folder, records, tmp_path):
    teacher = tmp_path / "teacher.csv"
    lines = ["VideoId,LabelConfidencePairs", *(f"{v.id},1 0.5" for v in records[0].videos())]
    teacher.write_text("\n".join(lines))
    train_tiny(folder, records, teacher=teacher)
    teacher.write_text(teacher.read_text().replace("1 0.5", "1 0.6"))

    with pytest.raises(OutputError) as caught:
        train_tiny(folder, records, teacher=teacher)

    assert caught.value.problem == f"{folder} holds a run with other values of: --teacher."


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_folder_that_is_removed_while_it_is_trained_is_not_made_again(
    how, folder, records, monkeypatch
):
    whole = Records.training_batches

    def training_batches(self, *arguments, **options):
        for number, batch in enumerate(whole(self, *arguments, **options)):
            if number == 3:
                shutil.rmtree(folder.parent)
                if how == "replaced":
                    folder.mkdir(parents=True)
                    (folder / ".lock").touch()
            yield batch

    monkeypatch.setattr(Records, "training_batches", training_batches)

    with pytest.raises(TrainingError) as caught:
        train_tiny(folder, records, is_validated=True)

    assert str(caught.value) == (
        f"{folder} was removed or replaced while it was being trained.\n"
        "Give the same command again, and leave the folder in place until it ends."
    )
    assert folder.parent.exists() == (how == "replaced")
    assert not folder.joinpath("checkpoints").exists()


def test_a_run_that_is_being_trained_is_left_alone(folder, records):
    code = (
        "import sys; from pathlib import Path; from ensemble_kit.store.workspace import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()

        with pytest.raises(TrainingError) as caught:
            train_tiny(folder, records)

        other.communicate(b"\n")
    assert str(caught.value) == (
        f"{folder} is being trained by another process.\n"
        "Wait until that one ends, or give this run another --name."
    )
    assert train_tiny(folder, records).steps == 6


@pytest.mark.parametrize(
    ("blocked", "kept"), [("checkpoints/step-00000004", [2]), ("state", [2, 4])]
)
def test_a_full_disk_costs_no_more_than_the_steps_since_the_last_state(
    blocked, kept, folder, records, monkeypatch, tmp_path
):
    whole = train_tiny(tmp_path / "whole" / "tiny", records)
    with open_tensors(whole.folder.checkpoint(4)) as file:
        checkpoint = len(file.specs)
    state = checkpoint + 3 * len(list(SubModel(tiny_recipe(), records[0].schema).parameters()))
    room = checkpoint + state + 3 + (checkpoint if blocked == "state" else 0)  # tensors
    as_bytes = checkpoints._as_bytes

    def full_disk(tensor):
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return as_bytes(tensor)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "_as_bytes", full_disk)
        with pytest.raises(OutputError) as caught:
            train_tiny(folder, records)

    assert str(caught.value) == (
        f"{folder}/{blocked}.safetensors cannot be written: No space left on device.\n"
        "Free some space or name another folder; nothing was left half-written."
    )
    assert state_of(RunFolder(folder))[0].step == 2
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        ".lock",
        *(f"checkpoints/step-0000000{step}.safetensors" for step in kept),
        "metrics.jsonl",
        "state.safetensors",
    ]
    assert bytes_of(train_tiny(folder, records).folder) == bytes_of(whole.folder)


def test_what_a_step_draws_depends_on_seed_step_and_rank_alone():
    def draw(seed, step, rank=0):
        seed_step(seed, step, rank)
        return torch.rand(3).tolist()

    assert draw(0, 5) == draw(0, 5)
    assert len({tuple(draw(*key)) for key in ((0, 5), (5, 0), (0, 6), (1, 5), (0, 5, 1))}) == 5


def test_a_log_is_cut_at_the_first_line_that_is_not_whole(folder, records, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        stopped = train_tiny(folder, records)
    with stopped.folder.metrics.open("a") as log:
        log.write(json.dumps({"step": 4}) + '\n{"step": 3')

    trained = train_tiny(folder, records)

    assert [line["step"] for line in lines_of(trained)] == [1, 3, 6]
