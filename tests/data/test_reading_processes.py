"""Processes that read: what they give is what this process would have read."""

import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from example_bytes import frame_record

from ensemble_kit.data import reading_processes
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.frame_choice import FrameChoice
from ensemble_kit.data.tfrecord import BadRecord, write_records
from ensemble_kit.errors import RecordError

ONE_FRAME = {"rgb": np.ones((1, 3), np.uint8), "audio": np.ones((1, 2), np.uint8)}
SCRIPT = """
import sys, time
from ensemble_kit.data.dataset import Records

for batch in Records([sys.argv[1]]).training_batches(2, seed=0, workers=2):
    print("started", flush=True)
    time.sleep(0.01)
"""


def bytes_of(batch):
    arrays = [*batch.frames.values(), batch.num_frames, *batch.labels]
    if batch.frame_weights is not None:
        arrays.append(batch.frame_weights)
    return batch.ids, batch.epoch, [(a.dtype, a.shape, a.tobytes()) for a in arrays]


def children_of(pid):
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def wait_for(is_so):
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("workers", "options"),
    [
        (4, {}),  # more than there are files
        (2, {"choice": FrameChoice("random", 3, False), "start": 2, "rank": 1, "num_ranks": 3}),
    ],
    ids=["all", "a share of the chosen"],
)
def test_any_number_of_processes_gives_the_same_bytes_in_the_same_order(folder, workers, options):
    bad = frame_record("bad", [6], **ONE_FRAME)
    write_records(folder / "train1.tfrecord", [bad], force=True)

    def read(workers):
        records = Records([folder], skip_bad_records=True)
        batches = records.training_batches(4, seed=1, epochs=3, workers=workers, **options)
        return [bytes_of(batch) for batch in batches], [str(bad) for bad in records.skipped]

    batches, skipped = read(0)

    assert len(batches) == 9 - options.get("start", 0)
    assert len(skipped) == ("rank" not in options)  # another rank has it
    assert read(workers) == (batches, skipped)


@pytest.mark.parametrize("workers", [0, 1])
def test_memory_is_used_again_but_never_while_a_batch_lies_in_it(folder, workers):
    records = Records([folder])
    expected = [bytes_of(batch) for batch in islice(records.training_batches(4, seed=0), 12)]

    batches = records.training_batches(4, seed=0, workers=workers)
    places = set()
    for batch, own in zip(islice(batches, 8), expected, strict=False):
        assert bytes_of(batch) == own
        places.add(batch.frames["rgb"].ctypes.data)
    kept = list(islice(batches, 4))
    next(batches)
    batches.close()

    assert len(places) <= reading_processes.SMALL_AHEAD + reading_processes.LENT
    assert [bytes_of(batch) for batch in kept] == expected[8:]
    assert batch.frames["rgb"].flags.writeable


def test_an_error_in_a_process_is_raised_as_if_met_here(folder):
    path = folder / "train1.tfrecord"
    write_records(path, [frame_record("bad", [6], **ONE_FRAME)], force=True)

    with pytest.raises(BadRecord) as error:
        list(Records([folder]).training_batches(4, seed=0, workers=1))

    assert str(error.value) == (
        f"{path}, record 1: label 6 is outside the 6 classes (0 to 5).\n"
        "Give a schema that says so, or leave the record out with --skip-bad-records."
    )
    assert (error.value.path, error.value.number) == (path, 1)
    assert error.value.kind == "a label outside the classes"
    assert error.value.hint.startswith("Give a schema")
    assert children_of(os.getpid()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            signal.SIGKILL,
            "was killed, as the system does when memory runs out.\n"
            "Use fewer --workers, or give the machine more memory.",
        ),
        *(
            (
                number,
                f"was ended by {number.name}.\n"
                "Give the same command again; train resumes where it was.",
            )
            for number in (signal.SIGINT, signal.SIGTERM)
        ),
    ],
)
def test_a_process_that_is_ended_is_one_clear_error_and_none_is_left(
    number, message, folder, capfd
):
    batches = Records([folder]).training_batches(4, seed=0, workers=2)
    next(batches)
    _, second = children_of(os.getpid())
    os.kill(second, number)

    with pytest.raises(RecordError) as error:
        list(batches)

    assert str(error.value) == f"The reading process {second} {message}"
    assert capfd.readouterr().err == ""
    assert children_of(os.getpid()) == []


def test_a_process_that_fails_says_why_on_its_own(folder, monkeypatch, capfd):
    monkeypatch.setattr(reading_processes, "START", "import sys; sys.exit('no such thing')")

    with pytest.raises(RecordError) as error:
        next(Records([folder]).training_batches(4, seed=0, workers=1))

    pid = str(error.value).split()[3]
    assert str(error.value) == (
        f"The reading process {pid} ended with status 1; what it wrote stands above.\n"
        "Read with --workers 0 to see where it fails."
    )
    assert capfd.readouterr().err == "no such thing\n"


def test_memory_without_a_name_does_not_need_linux(folder, monkeypatch):
    expected = [
        bytes_of(batch) for batch in Records([folder]).training_batches(4, seed=0, epochs=1)
    ]
    monkeypatch.delattr(os, "memfd_create")

    batches = Records([folder]).training_batches(4, seed=0, epochs=1, workers=1)

    assert [bytes_of(batch) for batch in batches] == expected


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_one_it_reads_for(folder, tmp_path, ending):
    script = tmp_path / "script.py"  # without a guard of __main__
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "started\n"
    children = children_of(process.pid)
    assert len(children) == 2

    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)  # as a terminal does
    else:
        process.kill()
    _, written = process.communicate(timeout=20)

    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    if ending == signal.SIGINT:
        assert written.count("Traceback") == 1
        assert written.endswith("KeyboardInterrupt\n")
    else:
        assert written == ""
