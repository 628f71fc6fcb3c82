"""The one place that opens sessions of ONNX Runtime."""

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime

from ensemble_kit.choices import DEVICE, Device
from ensemble_kit.errors import ProviderError

LOGGER = logging.getLogger(__name__)
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # of which both install the same module
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(
    model: Path | str | bytes,
    *,
    device: Device = DEVICE,
    name: str,
    hint: str,
    options: onnxruntime.SessionOptions | None = None,
    is_folding: bool = True,
) -> onnxruntime.InferenceSession:
    """Open an ONNX model in ONNX Runtime, on the device that was asked for and no other.

    Args:
        model: The file, or its bytes.
        device: ``cpu`` or ``cuda``. ONNX Runtime falls back to the CPU in silence where CUDA's
            libraries are missing; this function refuses that.
        name: What errors call the model.
        hint: What the user should do where ONNX Runtime cannot open it.
        options: Of the session; its warnings are turned off.
        is_folding: Whether constants are computed once, while the session is opened.

    Raises:
        ProviderError: ONNX Runtime cannot open the model, or not on that device.
    """
    _warn_of_both()
    wanted = PROVIDERS[device]
    if wanted not in onnxruntime.get_available_providers():
        raise _not_on(name, wanted, "this build of ONNX Runtime does not have it")
    options = options or onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions too; warnings are not for users
    try:
        session = onnxruntime.InferenceSession(
            model,
            options,
            providers=[wanted],
            disabled_optimizers=None if is_folding else ["ConstantFolding"],
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ProviderError(
            f"ONNX Runtime cannot open {name}: {str(error).rstrip('.')}.", hint=hint
        ) from error
    found = session.get_providers()[0]
    if found != wanted:
        raise _not_on(name, wanted, f"the session got {found}")
    LOGGER.info("ONNX Runtime opened %s on %s", name, found)
    return session


@cache
def _warn_of_both() -> None:
    """Warn once where two packages of ONNX Runtime are installed.

    Each has overwritten files of the other: what runs is a mixture, which often lacks CUDA.
    """
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            return
    LOGGER.warning(
        "%s are installed, and have overwritten each other's files: "
        "pip uninstall %s, then install the one that you want",
        " and ".join(found),
        " ".join(PACKAGES),
    )


def _not_on(name: str, wanted: str, reason: str) -> ProviderError:
    return ProviderError(
        f"ONNX Runtime cannot run {name} on {wanted}: {reason}.",
        hint="Install onnxruntime-gpu with CUDA 13 and cuDNN 9, or ask for the CPU.",
    )
