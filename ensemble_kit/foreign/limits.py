"""Imports in a process of limited time and memory.

An ONNX file can be small and yet ask for a loop of 2^62 steps, for functions that double with each
call, or for gigabytes of one number. Only running such a file shows what it takes, so an import
runs in a child process, which can be ended. The limits grow with the files: a model of 1 GiB may
take 3 minutes and 14 GiB. Time is what the child computes, which a busy machine does not change;
only a child that takes ten times as long on the clock is ended too.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from ensemble_kit import errors
from ensemble_kit.errors import EnsembleKitError, ForeignModelError
from ensemble_kit.files import format_size
from ensemble_kit.foreign.conversion import ForeignFile, convert
from ensemble_kit.foreign.plan import ImportPlan
from ensemble_kit.interrupts import QUIET_START
from ensemble_kit.serving.onnx_file import needed_files, read_tensors

SECONDS, BYTES_PER_SECOND = 60, 10**7
PATIENCE = 10  # times the limit of processor time, on the clock
SECONDS_BETWEEN_LOOKS = 0.2
MEMORY, MEMORY_PER_BYTE = 2**31, 12
CODE = QUIET_START + "from ensemble_kit.foreign.limits import serve; serve({})"


def convert_in_child(plan: ImportPlan, *, seconds: int = SECONDS) -> ForeignFile:
    """Do what ``convert`` does in a child process whose time and memory are limited.

    Args:
        plan: What to import.
        seconds: The limit of processor time for a small file; a large one has more.

    Raises:
        ForeignModelError: The child needed more, or crashed.
        EnsembleKitError: Any error of ``convert``.
    """
    size = sum(file.stat().st_size for file in needed_files(plan.model, read_tensors(plan.model)))
    seconds += size // BYTES_PER_SECOND
    memory = MEMORY + size * MEMORY_PER_BYTE
    watched, held = os.pipe()
    # -P: a file of the current folder is never imported
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CODE.format(watched)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=[watched],
    )
    os.close(watched)
    request = json.dumps([plan.model_dump_json(), seconds, memory])
    try:
        answer, noise = _answer(child, request, plan.model, seconds)
    finally:
        child.kill()
        child.communicate()
        os.close(held)
    if child.returncode == 0:
        return _file_of(json.loads(answer.splitlines()[-1]))
    raise _death(plan.model, child.returncode, noise, seconds, memory)


def _answer(
    child: "subprocess.Popen[str]", request: str, model: Path, seconds: int
) -> tuple[str, str]:
    """Return what a child writes on standard output and error, within its limits of time."""
    begun = time.monotonic()
    given: str | None = request
    while True:
        try:
            return child.communicate(given, timeout=SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            given = None  # the rest of the input is kept
        passed = time.monotonic() - begun
        computed = _computed(child.pid)
        if (passed if computed is None else computed) > seconds:
            raise ForeignModelError(
                f"{model} could not be read and tested in {seconds} seconds of processor time.",
                hint="Export a model that is smaller or faster.",
            )
        if passed > seconds * PATIENCE:
            raise ForeignModelError(
                f"{model} could not be read and tested in {seconds * PATIENCE} seconds.",
                hint="Try again when the machine is less busy.",
            )


def _computed(pid: int) -> float | None:
    """Return the seconds that a process has computed; None where only the clock can say it.

    Those of its first thread, which takes part in all work: other threads would count as often as
    there are cores.
    """
    try:
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user, system
    except (OSError, IndexError, ValueError):
        return None


def _file_of(answer: dict[str, str]) -> ForeignFile:
    if "error" in answer:
        kind = getattr(errors, answer["error"])
        assert issubclass(kind, EnsembleKitError)
        raise kind(answer["problem"], hint=answer["hint"])
    return ForeignFile(
        Path(answer["path"]),
        answer["name"],
        int(answer["num_values"]),
        float(answer["worst_difference"]),
    )


def _death(
    model: Path, code: int, noise: str, seconds: int, memory: int
) -> EnsembleKitError | RuntimeError:
    """Return the error of a child that ended without an answer."""
    if code == -signal.SIGXCPU:
        what = f"took more than {seconds} seconds of processor time"
    elif "MemoryError" in noise or "bad_alloc" in noise or code == -signal.SIGKILL:
        what = f"needed more than {format_size(memory)} of memory"
    elif code < 0:
        what = f"ended with signal {signal.Signals(-code).name}"
    else:
        return RuntimeError(noise)  # a mistake of the kit's
    return ForeignModelError(
        f"{model} could not be read and tested: the process {what}.",
        hint="Export a smaller model, or the model again from the framework that made it.",
    )


def serve(watched: int) -> None:
    """Do what a parent asks for on standard input, and answer on standard output.

    Args:
        watched: The reading end of a pipe that the parent holds open for as long as it lives.
    """
    threading.Thread(target=_end_with_parent, args=[watched], daemon=True).start()
    text, seconds, memory = json.loads(sys.stdin.read())
    _limit(seconds, memory)
    try:
        file = convert(ImportPlan.model_validate_json(text))
        answer = {
            "path": str(file.path),
            "name": file.name,
            "num_values": str(file.num_values),
            "worst_difference": repr(file.worst_difference),
        }
    except EnsembleKitError as error:
        answer = {"error": type(error).__name__, "problem": error.problem, "hint": error.hint}
    print(json.dumps(answer))


def _end_with_parent(watched: int) -> None:
    os.read(watched, 1)  # nothing is ever written, so this returns when the parent has ended
    os._exit(1)


def _limit(seconds: int, memory: int) -> None:
    """Limit this process; where the system has no such limits, the parent's clock is left."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        # the processor time of all threads together, in case the parent's clock fails
        resource.setrlimit(resource.RLIMIT_CPU, (seconds * 64, seconds * 64))
