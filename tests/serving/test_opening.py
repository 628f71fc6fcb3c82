import logging

import pytest

from ensemble_kit.serving import opening


@pytest.fixture(autouse=True)
def forget():
    yield
    opening._warn_of_both.cache_clear()


def installed(monkeypatch, *names):
    def version(name):
        if name not in names:
            raise opening.PackageNotFoundError(name)
        return "1.30.0"

    monkeypatch.setattr(opening, "version", version)
    opening._warn_of_both.cache_clear()


def test_two_packages_of_onnx_runtime_are_warned_of_once(monkeypatch, caplog):
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")

    opening._warn_of_both()
    opening._warn_of_both()

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "onnxruntime 1.30.0 and onnxruntime-gpu 1.30.0 are installed, and have overwritten each "
        "other's files: pip uninstall onnxruntime onnxruntime-gpu, then install the one that you "
        "want"
    )


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu"])
def test_one_of_them_is_fine(name, monkeypatch, caplog):
    installed(monkeypatch, name)

    opening._warn_of_both()

    assert not caplog.records
