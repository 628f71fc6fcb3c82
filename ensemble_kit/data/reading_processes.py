"""Batches read ahead by other processes, in memory that they share with this one.

Each process is a fresh interpreter that imports NumPy and ``data`` and no torch: about 50 MB, and
ready in a third of a second. It is neither forked, which may hang where torch's or CUDA's threads
held a lock, nor a child of ``multiprocessing``, which would import the user's script once more.

What the frames are written to is a few blocks of memory without a name, each used again as soon
as nothing refers to the batch that lay in it: fresh shared memory, which the system clears page by
page, takes ten times as long to fill. Plans and all that a batch holds beside its frames go
through pipes. A process ends when its pipe does, so none is left behind, however this one ends.
"""

import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.batch import Batch, BatchLayout, Contents
from ensemble_kit.data.order import BatchPlan
from ensemble_kit.data.reading import BatchReader, Source
from ensemble_kit.data.tfrecord import BadRecord
from ensemble_kit.errors import EnsembleKitError, RecordError
from ensemble_kit.interrupts import QUIET_START

AHEAD = 2  # batches that a process has to do or has done: one to write, one to be taken
# Of small ones, which are written faster than a busy machine wakes who takes them.
SMALL_AHEAD, SMALL_BATCH = 4, 4 << 20
LENT = 2  # blocks whose batches may be in use: what a loop has in hand, and the next
START = QUIET_START + (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from ensemble_kit.data.reading_processes import serve; serve()"
)
# One thread each: there is one process for each core already.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def read_in_processes(
    source: Source, plans: Iterator[BatchPlan], num_processes: int
) -> Generator[tuple[Batch, list[BadRecord]], None, None]:
    """Yield the batch of each plan, in order, and the records that were left out of it.

    Raises:
        RecordError: A file has gone or changed, or a process was killed.
        BadRecord: A record is bad and such ones are not skipped.
    """
    with ExitStack() as stack:
        blocks = [Block() for _ in range(SMALL_AHEAD * num_processes + LENT)]
        files = [block.file for block in blocks]
        for block in blocks:
            stack.callback(block.close)
        processes = [stack.enter_context(Process(source, files)) for _ in range(num_processes)]
        asked: deque[tuple[Process, Block, BatchLayout, BatchPlan]] = deque()
        ahead = AHEAD
        while True:
            while len(asked) < ahead * num_processes and (plan := next(plans, None)) is not None:
                block = next(block for block in blocks if block.is_free)
                process = min(processes, key=lambda each: each.num_asked)
                layout = source.layout(plan)
                ahead = SMALL_AHEAD if layout.num_bytes <= SMALL_BATCH else AHEAD
                block.reserve(layout.num_bytes)
                process.ask(plan, layout, blocks.index(block))
                asked.append((process, block, layout, plan))
            if not asked:
                return
            process, block, layout, plan = asked.popleft()
            contents, skipped = process.answer()
            batch = layout.batch(block.lend(), contents, epoch=plan.epoch)
            if sum(block.is_lent for block in blocks) > LENT:
                batch = batch.copy()
            yield batch, skipped
            del batch


class Block:
    """Memory without a name that this process and those it starts share.

    Attributes:
        file: The descriptor of the memory.
        is_asked: Whether a process has yet to write a batch to it.
    """

    def __init__(self) -> None:
        self.file = _nameless_file()
        self.is_asked = False
        self._map: mmap.mmap | None = None
        self._lent: weakref.ref[NDArray[np.uint8]] | None = None

    @property
    def is_lent(self) -> bool:
        """Whether a batch that lies in it is still referred to."""
        return self._lent is not None and self._lent() is not None

    @property
    def is_free(self) -> bool:
        """Whether it holds nothing that is still needed."""
        return not self.is_asked and not self.is_lent

    def reserve(self, num_bytes: int) -> None:
        """Make room for a batch that a process is to write."""
        self.is_asked = True
        if self._map is None or len(self._map) < num_bytes:
            # The next power of two: what is never written takes no memory.
            size = max(mmap.PAGESIZE, 1 << (num_bytes - 1).bit_length())
            os.ftruncate(self.file, size)
            self._map = mmap.mmap(self.file, size)

    def lend(self) -> NDArray[np.uint8]:
        """Return the memory; it is free again when no array refers to it any more."""
        assert self._map is not None
        memory = np.frombuffer(self._map, np.uint8)
        self.is_asked = False
        self._lent = weakref.ref(memory)
        return memory

    def close(self) -> None:
        """Close the descriptor; the memory stays for as long as batches refer to it."""
        os.close(self.file)


class Process:
    """A process that reads batches.

    Args:
        source: What it reads.
        files: The descriptors of all blocks.

    Attributes:
        num_asked: How many batches it has been asked for and has not given.
    """

    def __init__(self, source: Source, files: list[int]) -> None:
        self.num_asked = 0
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-c", START],  # -P: no module from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=files,
            env=os.environ | ENVIRONMENT,
            process_group=0,  # Ctrl-C is for the process that trains; it ends this one
        )
        self._send(sys.path)
        self._send((source, files))

    def ask(self, plan: BatchPlan, layout: BatchLayout, block: int) -> None:
        """Ask for a batch in a block."""
        self._send((plan, layout, block))
        self.num_asked += 1

    def answer(self) -> tuple[Contents, list[BadRecord]]:
        """Wait until the first batch that was asked for lies in its block.

        Raises:
            EnsembleKitError: What the process met with, or that it has been killed.
        """
        assert self._popen.stdout is not None
        try:
            answer = pickle.load(self._popen.stdout)
        except (EOFError, pickle.UnpicklingError):  # the second, if it was killed while it wrote
            raise self._death() from None
        if isinstance(answer, EnsembleKitError):
            raise answer
        self.num_asked -= 1
        return answer  # type: ignore[no-any-return]

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *exception: object) -> None:
        """End the process at once; it has nothing to lose."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.kill()
        self._popen.wait()
        self._popen.stdout.close()
        with suppress(BrokenPipeError):  # what was still to be sent
            self._popen.stdin.close()

    def _send(self, message: Any) -> None:
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # that it ended is reported where its answer is missing
            pickle.dump(message, self._popen.stdin, pickle.HIGHEST_PROTOCOL)
            self._popen.stdin.flush()

    def _death(self) -> RecordError:
        status = self._popen.wait()
        if status == -signal.SIGKILL:
            return RecordError(
                f"The reading process {self._popen.pid} was killed, as the system does when memory "
                "runs out.",
                hint="Use fewer --workers, or give the machine more memory.",
            )
        if status < 0:
            return RecordError(
                f"The reading process {self._popen.pid} was ended by "
                f"{signal.Signals(-status).name}.",
                hint="Give the same command again; train resumes where it was.",
            )
        return RecordError(
            f"The reading process {self._popen.pid} ended with status {status}; what it wrote "
            "stands above.",
            hint="Read with --workers 0 to see where it fails.",
        )


def serve() -> None:
    """Answer what is asked on stdin, until that ends: what a reading process runs."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not print between the answers
    source, files = pickle.load(sys.stdin.buffer)
    questions: queue.SimpleQueue[tuple[BatchPlan, BatchLayout, int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(questions,), daemon=True).start()
    reader = BatchReader(source)
    maps: dict[int, mmap.mmap] = {}
    while True:
        plan, layout, block = questions.get()
        if block not in maps or len(maps[block]) < layout.num_bytes:
            maps[block] = mmap.mmap(files[block], os.fstat(files[block]).st_size)
        answer: Any
        try:
            answer = reader.read(plan, layout, np.frombuffer(maps[block], np.uint8))
        except EnsembleKitError as error:
            answer = error
        with suppress(BrokenPipeError):  # the listener ends the process
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _listen(questions: "queue.SimpleQueue[Any]") -> None:
    """Take questions as they come, so that who asks never waits for an answer to be fetched."""
    while True:
        try:
            questions.put(pickle.load(sys.stdin.buffer))
        except (EOFError, pickle.UnpicklingError):
            os._exit(0)


def _nameless_file() -> int:
    """Return the descriptor of memory that is gone when the last process has closed it."""
    if hasattr(os, "memfd_create"):  # /dev/shm is 64 MiB in a container, this is not limited
        return os.memfd_create("ensemble-kit")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
