"""An ONNX file as a model repository of NVIDIA Triton.

The fields are those of ``model_config.proto`` in triton-inference-server/common.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from os.path import exists, isdir
from pathlib import Path

from ensemble_kit.choices import TRITON_DELAY, TRITON_INSTANCES
from ensemble_kit.errors import OutputError
from ensemble_kit.files import refuse_overwrite, removed_on_failure, written_aside
from ensemble_kit.serving.signature import Port, inputs_of, outputs_of
from ensemble_kit.store.dtypes import BY_NUMPY
from ensemble_kit.store.provenance import OnnxMetadata

MODEL = "model.onnx"  # what Triton looks for in the folder of a version
VERSION, CONFIG, LABELS = "1", "config.pbtxt", "labels.txt"
MAX_BATCH_SIZE = 32
WARM_UP = "warmup/num_frames"  # the one input of the request that may not be zero


@dataclass(frozen=True)
class TritonConfig:
    """How Triton serves a model, where it is not left to Triton.

    Attributes:
        instances: Copies of the model that run at a time, on each GPU where there is one.
        max_delay: Microseconds that a request may wait for others to join its batch.
        warms_up: Whether Triton runs the model on one made-up video when it loads it, so that the
            first request is as fast as the others.

    Raises:
        ValueError: ``instances`` is less than 1, or ``max_delay`` less than 0.
    """

    instances: int = TRITON_INSTANCES
    max_delay: int = TRITON_DELAY
    warms_up: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.instances < 1 or self.max_delay < 0:
            raise ValueError(
                f"instances is {self.instances} and max_delay {self.max_delay}; they must be at "
                "least 1 and 0"
            )


def lacks_repository(path: Path, folder: Path) -> bool:
    """Return whether no model of that name is there whole: its configuration is written last."""
    return not exists(folder / path.stem / CONFIG)


def refuse_repository(path: Path, folder: Path, *, force: bool, keep_same: bool = False) -> None:
    """Raise ``OutputError`` if a model of that name is there and may not be replaced.

    Or if nothing can be written there: it is asked before the export, which would be left without.

    Args:
        path: The ONNX file.
        folder: The repository.
        force: Whether files that exist may be replaced.
        keep_same: Whether a part of the model may be there, as ``written_aside`` has it.
    """
    home = folder / path.stem
    for name in (CONFIG,) if keep_same else (CONFIG, LABELS, f"{VERSION}/{MODEL}"):
        refuse_overwrite(home / name, force=force)
    above = next(each for each in (home, *home.absolute().parents) if isdir(each))
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise OutputError(
            f"{home} cannot be written: {error.strerror}.",
            hint="Name a folder that you may write to.",
        ) from error


def write_repository(
    path: Path,
    metadata: OnnxMetadata,
    folder: Path,
    config: TritonConfig = TritonConfig(),
    *,
    force: bool,
    keep_same: bool = False,
) -> Path:
    """Lay out a model repository: ``<stem>/config.pbtxt``, ``labels.txt`` and ``1/model.onnx``.

    Where one of the files cannot be written, those that were not there before are removed again.

    Args:
        path: The ONNX file; it is copied.
        metadata: What the file says of itself, which its export has in hand.
        folder: The repository.
        config: How Triton serves it.
        force: Whether files that exist may be replaced.
        keep_same: Whether a part of the model may be there, as ``written_aside`` has it.

    Returns:
        The configuration's path.

    Raises:
        OutputError: A file exists and ``force`` is False, or the disk refuses one.
    """
    refuse_repository(path, folder, force=force, keep_same=keep_same)
    home = folder / path.stem
    copies = {
        home / VERSION / (MODEL if source == path else source.name): source
        for source in metadata.files(path)
    }
    labels = "".join(f"{' '.join(label.split())}\n" for label in metadata.label_names)
    contents = {home / LABELS: labels.encode()}
    if config.warms_up:
        contents[home / WARM_UP] = _length(metadata).to_bytes(8, "little")
    text = repository_config(metadata, name=path.stem, config=config)
    contents[home / CONFIG] = text.encode()  # last: what has it is whole
    with removed_on_failure(*copies, *contents):
        for target, source in copies.items():
            with written_aside(target, force=force, keep_same=keep_same) as aside:
                shutil.copyfile(source, aside)
        for target, content in contents.items():
            with written_aside(target, force=force, keep_same=keep_same) as aside:
                aside.write_bytes(content)
    return home / CONFIG


def repository_config(
    metadata: OnnxMetadata,
    *,
    name: str,
    config: TritonConfig = TritonConfig(),
) -> str:
    """Return ``config.pbtxt``.

    Triton may join requests to a batch, because the output for a video does not depend on the other
    videos. It joins only requests of one shape, so clients should pad to a common length.
    """
    lines = [
        f"name: {json.dumps(name, ensure_ascii=False)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH_SIZE}",
        *(_entry("input", port) for port in inputs_of(metadata)),
        *(_entry("output", port) for port in outputs_of(metadata)),
        f"dynamic_batching {{ max_queue_delay_microseconds: {config.max_delay} }}",
        f"instance_group [ {{ count: {config.instances} }} ]",
        *(_warm_up(metadata) if config.warms_up else ()),
    ]
    return "\n".join(lines) + "\n"


def _warm_up(metadata: OnnxMetadata) -> Iterator[str]:
    """Describe a request of one video: frames of zeros, as many as the longest may have."""
    yield "model_warmup {"
    yield '  name: "one video"'
    yield "  batch_size: 1"
    for port in inputs_of(metadata):
        is_length = port.name == "num_frames"
        sizes = ", ".join(map(str, port.example)) or "1"
        data = f'input_data_file: "{Path(WARM_UP).name}"' if is_length else "zero_data: true"
        yield f'  inputs {{ key: "{port.name}" value {{'
        yield f"    {_data_type(port)}"
        yield f"    dims: [ {sizes} ]"
        yield f"    {data}"
        yield "  } }"
    yield "}"


def _length(metadata: OnnxMetadata) -> int:
    return inputs_of(metadata)[0].example[0]


def _data_type(port: Port) -> str:
    return f"data_type: TYPE_{BY_NUMPY[port.value_type].name.upper()}"


def _entry(kind: str, port: Port) -> str:
    """Describe an input or output without its batch, which ``max_batch_size`` stands for.

    Nothing may have no dimension, so what is one number a video is sent as ``(batch, 1)`` and
    given to the graph as ``(batch,)``.
    """
    sizes = ", ".join(str(-1 if isinstance(size, str) else size) for size in port.shape)
    fields = [f'name: "{port.name}"', _data_type(port)]
    fields += [f"dims: [ {sizes} ]"] if port.shape else ["dims: [ 1 ]", "reshape: { shape: [ ] }"]
    if port.name == "probabilities":
        fields.append(f'label_filename: "{LABELS}"')
    return "\n".join([f"{kind} {{", *(f"  {field}" for field in fields), "}"])
