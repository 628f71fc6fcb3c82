"""Fixtures that every test may ask for."""

import gc
import os
import secrets
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from chosen_fixture import chosen, own_chosen  # noqa: F401 - fixtures
from click.testing import CliRunner
from shards_fixture import shard_records, shards  # noqa: F401 - fixtures
from workspace_fixture import (  # noqa: F401 - fixtures
    built,
    ensemble,
    exported,
    exported_int4,
    fused,
    own_ensemble,
    own_workspace,
    selection,
    workspace,
)

if TYPE_CHECKING:
    import torch

PROJECT_ROOT = Path(__file__).resolve().parents[1]

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread each: as many workers as cores already
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start a hundred processes. Each would compile PyTorch's modules again where no bytecode is
# kept: twice the time to import them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A script that runs the tests in the background has the first ignored and nohup the second, and so
# would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add how many damaged files ``tests/fuzz`` reads, and which."""
    group = parser.getgroup("fuzz", "damaged files")
    group.addoption("--fuzz", type=int, metavar="N", help="Read N of each kind.")
    group.addoption("--fuzz-seed", type=int, metavar="SEED", help="Whatever is damaged, and how.")


def pytest_configure(config: pytest.Config) -> None:
    """Draw a seed where more files are asked for; the suite's own are the same each time."""
    if config.option.fuzz_seed is None:
        config.option.fuzz_seed = secrets.randbelow(2**32) if config.option.fuzz else 0


def pytest_collection_finish() -> None:
    """Have the garbage collector leave out what is there for good: all modules and all tests.

    It would look through these millions of objects again and again: an eighth of an export's time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say which seed was drawn."""
    return f"--fuzz-seed {config.option.fuzz_seed}" if config.option.fuzz else None


@pytest.fixture
def rng() -> "torch.Generator":
    """A random generator in a known state."""
    import torch

    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real records; a test that asks for it is skipped where there is none."""
    named = os.environ.get("ENSEMBLE_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data")
    folder = Path(named).resolve()  # tests link to it, and change the current folder
    if not folder.is_dir():
        pytest.skip(f"no real records: {folder} does not exist (name them in ENSEMBLE_KIT_DATA)")
    return folder


@pytest.fixture(scope="session")
def torch_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain module as torch.onnx exports it, which takes seconds."""
    from foreign_models import write_torch_model

    return write_torch_model(tmp_path_factory.mktemp("torch") / "recurrent.onnx")


@pytest.fixture
def import_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import foreign models without a child process, which takes seconds; see test_limits.py."""
    from ensemble_kit.foreign import stage
    from ensemble_kit.foreign.conversion import convert

    monkeypatch.setattr(stage, "convert_in_child", convert)


@pytest.fixture
def runner() -> CliRunner:
    """Runs a command in this process; its result has ``exit_code``, ``stdout`` and ``stderr``."""
    return CliRunner()
