"""Feed damaged files to what reads them, in this process, within bounds of time and memory."""

import faulthandler
import os
import pickle
import resource
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType

import torch
from mutators import Damage

from ensemble_kit.errors import EnsembleKitError

PATIENCE = 20  # seconds of the processor for one file, of which a whole one takes milliseconds
ROOM = 2**30  # bytes that one file may add to the process's address space
LONGEST, LINES = 4_000, 12  # characters and lines of a message


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: What it is called.
        file_name: What its reader wants it to be called.
        originals: Whole files, which the reader takes.
        damage: What is done to one.
        read: Reads all of the file of a path, as the commands do.
        cost: How many times as long as a cheap kind's reading one takes; so many fewer are read.
        is_apart: Whether the kit reads it in another process, so that a crash of a library is
            an error of the kit like any other.
    """

    name: str
    file_name: str
    originals: tuple[bytes, ...]
    damage: Damage
    read: Callable[[Path], object]
    cost: int = 1
    is_apart: bool = False


class OutOfTimeError(BaseException):
    """A reader took too long. No ``Exception``, so that no reader takes it for a problem."""


@dataclass
class Findings:
    """What became of the files of one kind.

    Attributes:
        read: How many were read without a word.
        refused: How many ended in an error of the kit.
        failures: What else came out, once for each place it came from: the file's number and how.
        messages: Messages of the kit that nobody should see.
    """

    read: int = 0
    refused: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, place: str, number: int, text: str) -> None:
        """Note a failure; the first of each place is kept."""
        self.counts[place] += 1
        self.failures.setdefault(place, (number, text))

    def report(self, kind: Kind, seed: int) -> str:
        """Return the failures in words, with what it takes to see one again."""
        lines = [f"{kind.name}: {sum(self.counts.values())} failures, seed {seed}"]
        for place, count in self.counts.most_common():
            number, text = self.failures[place]
            lines += [f"--- {count} times {place}; --fuzz-seed {seed}, file {number}", text]
        return "\n".join(lines)


def damaged(kind: Kind, seed: int, number: int) -> bytes:
    """Return a damaged file; the same for the same kind, seed and number."""
    random = Random(f"{seed}/{kind.name}/{number}")
    return kind.damage(random, random.choice(kind.originals))


def feed(kind: Kind, folder: Path, *, count: int, seed: int, first: int = 0) -> Findings:
    """Read ``count`` damaged files and say what came of them."""
    findings = Findings()
    path = folder / kind.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    with _limited_memory(ROOM):
        for number in range(first, first + count):
            data = damaged(kind, seed, number)
            path.unlink(missing_ok=True)  # another file: an older one may still be mapped
            path.write_bytes(data)
            _read(kind, path, number, findings)
    return findings


def _read(kind: Kind, path: Path, number: int, findings: Findings) -> None:
    refused, place, text = _read_apart(kind, path) if kind.is_apart else _outcome(kind, path)
    if refused:
        findings.refused += 1
        findings.errors[refused] += 1
    elif not place:
        findings.read += 1
    if place:
        findings.add(place, number, text)


def _outcome(kind: Kind, path: Path) -> tuple[str, str, str]:
    """Return which error of the kit came out, and the place and the text of a failure, or ''."""
    try:
        with _limited_time(PATIENCE):
            kind.read(path)
    except EnsembleKitError as error:
        return type(error).__name__, _problem_of(str(error)), repr(str(error))[:1_000]
    except (Exception, OutOfTimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/ensemble_kit/" in frame.filename] or frames
        place = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
        return "", place, "".join(traceback.format_exception(error, limit=-6))[-3_000:]
    return "", "", ""


def _read_apart(kind: Kind, path: Path) -> tuple[str, str, str]:
    """Do the same in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.disable()  # a crash is expected, and told by the exit status
        torch.set_num_threads(1)  # the threads of this process are not in the fork
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(_outcome(kind, path), pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "crash", "", ""
    outcome: tuple[str, str, str] = pickle.loads(answer)
    return outcome


def _problem_of(message: str) -> str:
    """Say why a message should not be shown, or '': it would fill a terminal, or steer it."""
    if len(message) > LONGEST:
        return "a message that is too long"
    if not message.replace("\n", "").isprintable() or len(message.splitlines()) > LINES:
        return "a message that steers the terminal"
    return ""


@contextmanager
def _limited_time(seconds: int) -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _limited_memory(room: int) -> Iterator[None]:
    """Let this process's address space grow by so much and no more: beyond is a MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
