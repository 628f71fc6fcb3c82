"""End commands at random moments, run them again, and print what became of them. A script.

    python killed_commands.py FOLDER SEED NUMBER [COMMAND]...

Each of the commands, or of those named, is ended NUMBER times: by SIGKILL, SIGTERM or SIGINT in
turn, sent to the process itself or, of a command with children, to one of these. Then the same
command is run again, and what it leaves is compared with what an undisturbed run leaves. Python
and the libraries are loaded once; each run is a fork.
"""

import importlib
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path

import numpy as np
import onnxruntime  # noqa: F401 - loaded before the forks, as torch._dynamo is
import torch
import torch._dynamo
from builders import tiny_recipe_text
from foreign_models import WIDTH, parsed_model
from web_site import Site

import ensemble_kit
from ensemble_kit.cli import demo
from ensemble_kit.interrupts import INTERRUPTED
from ensemble_kit.store.tensor_files import open_tensors

MARK = "ENSEMBLE_KIT_KILLED"  # in the environment of a run and of all that it starts
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 300  # seconds for a run
GRACE = 20  # seconds in which children follow their parent
RECORDS = "--train data/train/*.tfrecord --validation data/validate/*.tfrecord"
SYNTHETIC = (
    f"--train 48 --validate 20 --test 18 --classes 6 --frames 2:9 --shards 3 --modality rgb={WIDTH}"
)
SMALL = " --set training.max_steps=20 --set training.checkpoint_every=10"


@dataclass(frozen=True)
class Case:
    """A command, what must have been run before it, and what it leaves.

    Attributes:
        line: The words of the command.
        needs: The names of the cases that run before it in its folder.
        leaves: The files and folders that are compared.
        has_children: Whether other processes work for it.
    """

    line: str
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    has_children: bool = False


CHOSEN = ("train", "select")
EXPORTED = (*CHOSEN, "fuse", "export-onnx")
EVERYTHING = (".",)  # of a command that writes nothing
CASES = {
    "train": Case(f"train mean.toml rnn.toml {RECORDS}", (), ("runs",)),
    "train --jobs": Case(f"train mean.toml rnn.toml {RECORDS} --jobs 2", (), ("runs",), True),
    "train --workers": Case(f"train mean.toml {RECORDS} --workers 2", (), ("runs",), True),
    "average": Case(
        "average runs/rnn --even-if-worse -o mean.safetensors", ("train",), ("mean.safetensors",)
    ),
    "predict a file": Case(
        "predict runs/rnn/averaged.safetensors data/test/*.tfrecord -o p.safetensors",
        ("train",), ("p.safetensors",),
    ),
    "predict a folder": Case(
        "predict runs/rnn/averaged.safetensors data/test/*.tfrecord -o test/", ("train",), ("test",)
    ),
    "predict --jobs": Case(
        "predict runs/rnn/averaged.safetensors data/test/*.tfrecord -o test/ --jobs 2",
        ("train",), ("test",), True,
    ),
    "predict --window": Case(
        "predict runs/rnn/averaged.safetensors data/test/*.tfrecord --window 3 -o windows.jsonl",
        ("train",), ("windows.jsonl",),
    ),
    "predict --predictions": Case(
        "predict ensemble/selection.json --predictions runs/mean/validation.safetensors "
        "runs/rnn/validation.safetensors -o mixed.csv",
        CHOSEN, ("mixed.csv",),
    ),
    "predictions merge": Case(
        "predictions merge test/ -o all.csv", ("train", "predict a folder"), ("all.csv",)
    ),
    "select": Case("select --report", ("train",), ("ensemble",)),
    "fuse": Case("fuse", CHOSEN, ("ensemble/fused.safetensors",)),
    "export-onnx": Case("export-onnx --repeats 2", (*CHOSEN, "fuse"), ("ensemble",)),
    "export-onnx --triton": Case(
        "export-onnx --repeats 2 --low-memory --triton models", (*CHOSEN, "fuse"),
        ("ensemble", "models"),
    ),
    "predict an export": Case(
        "predict ensemble/ensemble.onnx data/validate/*.tfrecord -o p.safetensors",
        EXPORTED, ("p.safetensors",),
    ),
    "calibrate": Case(
        "calibrate ensemble/ensemble.onnx p.safetensors -o ensemble/calibrated.onnx",
        (*EXPORTED, "predict an export"), ("ensemble",),
    ),
    "evaluate": Case(
        "evaluate runs/rnn/averaged.safetensors data/test/*.tfrecord --rankings",
        ("train",), EVERYTHING,
    ),
    "verify": Case("verify ensemble/ensemble.onnx data/validate/*.tfrecord", EXPORTED, EVERYTHING),
    "runs": Case("runs", ("train",), EVERYTHING),
    "import-onnx": Case(
        "import-onnx foreign.onnx data/test/*.tfrecord --input rgb=x", (), ("runs",), True
    ),
    # its page has the seconds that models took
    "report": Case("report data/test/*.tfrecord -o page.html", CHOSEN),
    "data synthesize": Case(f"data synthesize made {SYNTHETIC}", (), ("made",)),
    "data convert": Case(
        "data convert features --labels labels.csv --quantise -o own", (), ("own",)
    ),
    "data check": Case("data check data/train/*.tfrecord", (), EVERYTHING),
    "data info": Case("data info data/train/*.tfrecord", (), EVERYTHING),
    "data download": Case(
        "data download youtube8m --partition 2/frame/train -o fetched", (), ("fetched",)
    ),
    "recipes new": Case("recipes new own.toml", (), ("own.toml",)),
    "recipes copy": Case("recipes copy willow/gru copied.toml", (), ("copied.toml",)),
    "recipes check": Case("recipes check mean.toml rnn.toml", (), EVERYTHING),
    "recipes list": Case("recipes list --ensembles", (), EVERYTHING),
    "demo": Case("demo", (), ("demo/runs", "demo/ensemble/fused.safetensors")),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write what no command writes: recipes, a foreign model and records."""
    folder.mkdir(parents=True)
    for name, pooling in (("mean", "average"), ("rnn", "gru")):
        text = tiny_recipe_text(
            pooling=pooling, max_steps=12, checkpoint_every=3, average_last=3, batch_size=8
        )
        (folder / f"{name}.toml").write_text(text)
    inputs, output = f"float[b, t, {WIDTH}] x", "float[b, 6] p"
    body = """
       one = Constant <value_ints = [1]> ()
       m = ReduceSum <keepdims = 0> (x, one)
       h = MatMul (m, w)
       p = Sigmoid (h)
    """
    weights = torch.linspace(-1, 1, WIDTH * 6).reshape(WIDTH, 6).numpy()
    model = parsed_model(inputs, body, {"w": weights}, 17, output)
    (folder / "foreign.onnx").write_bytes(model.SerializeToString())
    (folder / "features").mkdir()
    for number in range(40):
        np.save(folder / "features" / f"v{number}.npy", np.full((3, WIDTH), number, np.float32))
    labels = "".join(f"v{number},{number % 6}\n" for number in range(40))
    (folder / "labels.csv").write_text("VideoId,Labels\n" + labels)
    assert Run(folder, f"data synthesize data {SYNTHETIC}").end() == 0


def youtube8m() -> Site:
    """Return a server of two files that a part of YouTube-8M could consist of."""
    files = {f"train{end}.tfrecord": random.Random(end).randbytes(2**20) for end in ("aa", "09")}
    plan = {"files": {name: md5(content).hexdigest() for name, content in files.items()}}
    classes = "".join(f"{number},class {number}\n" for number in range(3862))
    return Site(
        {
            "/2/download_plans/frame_train.json": json.dumps(plan).encode(),
            "/2/vocabulary.csv": f"Index,Name\n{classes}".encode(),
            **{f"/2/frame/train/{name}": content for name, content in files.items()},
        }
    )


@dataclass(frozen=True)
class Blow:
    """What ends a command, and when.

    Attributes:
        number: The signal.
        after: Seconds of the command's own processor time, whatever the load; of a command with
            children, which spends its time waiting for them, seconds on the clock.
        has_children: Whether the command has children.
        is_at_child: Whether the signal goes to one of them.
    """

    number: signal.Signals
    after: float
    has_children: bool
    is_at_child: bool


class Run:
    """A command in a fork of this process, which writes what it says to ``said``."""

    def __init__(self, folder: Path, line: str, blow: "Blow | None" = None) -> None:
        self.blow = blow
        self.said = folder.with_suffix(".said")
        self.used = folder.with_suffix(".used")
        self.mark = f"{os.getpid()}.{time.monotonic_ns()}"
        self.pid = os.fork()
        if not self.pid:
            self._become(folder, line)

    def _become(self, folder: Path, line: str) -> None:
        code = 70
        try:
            os.setsid()
            with self.said.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(folder)
            os.environ[MARK] = self.mark
            torch.set_num_threads(1)
            sys.argv = ["ensemble-kit", *line.split()]
            if self.blow is not None:
                clock = signal.ITIMER_REAL if self.blow.has_children else signal.ITIMER_PROF
                signal.signal(signal.SIGALRM, self._strike)
                signal.signal(signal.SIGPROF, self._strike)
                signal.setitimer(clock, self.blow.after)
            importlib.import_module("ensemble_kit.__main__").run()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except KeyboardInterrupt:  # before the command line has begun, or after its end
            code = INTERRUPTED
        except BaseException:
            os.write(2, traceback.format_exc().encode())  # as Python would; a problem
        finally:
            self.used.write_text(repr(time.process_time()))  # its own, without its children's
            with suppress(Exception):
                sys.stdout.flush()
            os._exit(code)

    def _strike(self, *_: object) -> None:
        assert self.blow is not None
        children = list(self.family()) if self.blow.is_at_child else []
        with suppress(ProcessLookupError):  # the child has just ended
            os.kill(random.choice(children) if children else os.getpid(), self.blow.number)

    def end(self) -> int:
        """Return the exit status as a shell does, but negative for a signal that ended it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGABRT)
        raise AssertionError(f"{self.said} says more than {PATIENCE} s")

    def family(self) -> Iterator[int]:
        """Yield the processes that the command started and that live, without its own."""
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"{MARK}={self.mark}".encode() in (path / "environ").read_bytes():
                    yield int(path.name)

    def left_alive(self) -> int:
        """Return how many children live on, which are given a while to end."""
        end = time.monotonic() + GRACE
        while (living := len(list(self.family()))) and time.monotonic() < end:
            time.sleep(0.1)
        return living


def contents(folder: Path, leaves: tuple[str, ...]) -> dict[str, object]:
    """Return all that must not depend on whether a command was ended before."""
    files = [
        file
        for leaf in leaves
        for file in ((folder / leaf).rglob("*") if (folder / leaf).is_dir() else [folder / leaf])
        if file.is_file()
    ]
    found: dict[str, object] = {}
    for file in files:
        name = str(file.relative_to(folder))
        if file.name == "metrics.jsonl":  # it says when it was stopped, and how fast it went
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [line["loss"] for line in lines if "loss" in line]
        elif file.name == "state.safetensors":
            with open_tensors(file) as state:
                values = state.metadata.model_dump(mode="json")
            for key in ("seconds", "modified_ns"):
                values.pop(key)
            found[name] = values
        else:
            found[name] = file.read_bytes()
    return found


def base_of(folder: Path, case: Case) -> Path:
    """Return a folder in which the command can run; made once for the same needs."""
    base = folder / ("base-" + "-".join(case.needs).replace(" ", "-"))
    if not base.exists():
        parent = folder / "start"
        for number, _ in enumerate(case.needs):
            done = folder / ("base-" + "-".join(case.needs[: number + 1]).replace(" ", "-"))
            if not done.exists():
                shutil.copytree(parent, done)
                assert Run(done, CASES[case.needs[number]].line).end() == 0, done
            parent = done
        if not case.needs:
            shutil.copytree(parent, base)
    return base


class Problems(list[str]):
    """What was wrong, a line each."""


def kill_once(
    folder: Path, case: Case, whole: dict[str, object], seconds: float, draw: random.Random,
    number: signal.Signals, problems: Problems,
) -> str:  # fmt: skip
    """End the command once and run it again; return how the first run ended."""
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(base_of(folder, case), work)
    is_at_child = case.has_children and draw.random() < 0.5
    blow = Blow(number, draw.uniform(0.001, seconds), case.has_children, is_at_child)
    run = Run(work, case.line, blow)
    code = run.end()
    said = run.said.read_text(errors="replace")
    where = f"{number.name} to {'a child' if is_at_child else 'the command'}"
    expected = {0, -number if number == signal.SIGKILL else INTERRUPTED}
    if not is_at_child and code not in expected:
        problems.append(f"{where}: exit code {code}: {said[-400:]}")
    if "Traceback" in said:
        problems.append(f"{where}: a traceback: {said[-1500:]}")
    if living := run.left_alive():
        problems.append(f"{where}: {living} children live on")
    again = Run(work, case.line)
    code_again = again.end()
    said_again = again.said.read_text(errors="replace")
    # it had ended when it was killed
    is_there = code_again == 1 and re.search("exists already|holds files already", said_again)
    if code_again and not is_there:
        problems.append(f"{where}, then again: exit code {code_again}: {said_again[-600:]}")
    left = contents(work, case.leaves)
    for name in sorted(set(whole) | set(left)):
        if whole.get(name) != left.get(name):
            problems.append(f"{where}, then again: {name} is not what it was")
    problems.extend(
        f"{where}, then again: {part.name} is left" for part in work.rglob("*.part") if not is_there
    )
    return "finished" if code == 0 else "ended"


def main(folder: Path, seed: int, number: int, names: list[str]) -> None:
    """End each command ``number`` times and print one line for each."""
    for module in pkgutil.walk_packages(ensemble_kit.__path__, "ensemble_kit."):
        with suppress(ImportError):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    demo.COMMANDS = tuple(line + SMALL if " train " in line else line for line in demo.COMMANDS)
    prepare(folder / "start")
    os.environ["ENSEMBLE_KIT_DATA_DOWNLOAD_YOUTUBE8M_BASE_URL"] = youtube8m().url
    total = 0
    for name in names or list(CASES):
        case, draw, problems = CASES[name], random.Random(f"{seed}/{name}"), Problems()
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(base_of(folder, case), work)
        begun = time.monotonic()
        run = Run(work, case.line)
        code = run.end()
        assert code == 0, run.said.read_text()
        passed = time.monotonic() - begun
        seconds = passed if case.has_children else float(run.used.read_text())
        whole = contents(work, case.leaves)
        ends = [
            kill_once(folder, case, whole, seconds, draw, SIGNALS[each % len(SIGNALS)], problems)
            for each in range(number)
        ]
        total += ends.count("ended")
        print(
            f"{name}: {ends.count('ended')} of {number} ended before their end, "
            f"{len(problems)} problems, {seconds:.1f} s undisturbed", flush=True,
        )  # fmt: skip
        for problem in problems:
            print("   ", problem, flush=True)
    print(f"{total} commands were ended")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
