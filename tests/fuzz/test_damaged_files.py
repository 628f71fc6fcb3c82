"""No file may end in a traceback: a reader takes it, or refuses it with an error of the kit."""

import os
import signal
from dataclasses import replace
from itertools import count
from pathlib import Path

import fuzz_kinds
import harness
import numpy as np
import pytest
from harness import Kind, OutOfTimeError, damaged, feed

from ensemble_kit.errors import PredictionsError

DEFAULT = 2_000  # files of a kind, in the suite


def test_every_kind_has_a_name(kinds):
    assert tuple(kinds) == fuzz_kinds.NAMES


@pytest.mark.parametrize("name", fuzz_kinds.NAMES)
def test_whole_files_are_read(name, kinds, tmp_path):
    kind = kinds[name]
    path = tmp_path / kind.file_name
    path.parent.mkdir(parents=True, exist_ok=True)
    for original in kind.originals:
        path.write_bytes(original)
        kind.read(path)


@pytest.mark.parametrize("name", fuzz_kinds.NAMES)
def test_damaged_files_are_read_or_refused(name, kinds, tmp_path, request):
    number, seed = request.config.option.fuzz, request.config.option.fuzz_seed

    findings = feed(kinds[name], tmp_path, count=number or DEFAULT // kinds[name].cost, seed=seed)

    if findings.failures:
        pytest.fail(findings.report(kinds[name], seed), pytrace=False)
    assert findings.refused or name == "log"  # some is seen; a log leaves out damaged lines
    assert findings.read or name == "fused"  # some does no harm, unless a hash sees every byte


# Whether the above can fail


def kind_that(read):
    return Kind("bad", "bad.txt", (b"abc",), lambda random, data: data + random.randbytes(1), read)


def test_the_same_seed_makes_the_same_files(kinds):
    first, second = ([damaged(kinds["npz"], 5, n) for n in range(20)] for _ in range(2))

    assert first == second
    assert len(set(first)) > 10


def test_an_error_that_is_not_the_kits_is_a_failure_that_says_how_to_see_it_again(tmp_path):
    def read(path: Path) -> None:
        if path.read_bytes()[3] > 127:
            raise KeyError("x")
        raise PredictionsError("problem", hint="hint")

    findings = feed(kind_that(read), tmp_path, count=20, seed=7)

    assert findings.refused + sum(findings.counts.values()) == 20
    assert findings.refused
    assert len(findings.failures) == 1
    assert findings.report(kind_that(read), 7).startswith("bad: ")
    assert "--fuzz-seed 7, file " in findings.report(kind_that(read), 7)


def test_a_reader_without_an_end_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "PATIENCE", 0.05)

    findings = feed(kind_that(lambda _: all(True for _ in count())), tmp_path, count=1, seed=0)

    assert next(iter(findings.failures)).startswith(OutOfTimeError.__name__)


def test_a_crash_is_an_error_only_where_the_kit_reads_apart(tmp_path):
    def crash(path: Path) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    findings = feed(replace(kind_that(crash), is_apart=True), tmp_path, count=2, seed=0)

    assert findings.refused == 2


def test_a_failure_apart_is_a_failure(tmp_path):
    def read(path: Path) -> None:
        raise KeyError("x")

    findings = feed(replace(kind_that(read), is_apart=True), tmp_path, count=2, seed=0)

    assert list(findings.counts.values()) == [2]


def test_memory_is_bounded(tmp_path):
    findings = feed(kind_that(lambda _: np.zeros(2**31, bool)), tmp_path, count=1, seed=0)

    assert next(iter(findings.failures)).startswith(np._core._exceptions._ArrayMemoryError.__name__)


@pytest.mark.parametrize("message", ["a" * 5_000, "\x1b[2J", "a\n" * 20])
def test_a_message_that_fills_or_steers_a_terminal_is_a_failure(tmp_path, message):
    def read(path: Path) -> None:
        error = PredictionsError("problem", hint="hint")
        error.args = (message,)
        raise error

    assert feed(kind_that(read), tmp_path, count=1, seed=0).failures


def test_a_message_of_two_lines_is_none(tmp_path):
    def read(path: Path) -> None:
        raise PredictionsError("problem", hint="hint")

    assert not feed(kind_that(read), tmp_path, count=1, seed=0).failures


def test_seeds_make_other_files(kinds):
    kind = kinds["predictions"]
    assert damaged(kind, 0, 0) != damaged(kind, 1, 0)
