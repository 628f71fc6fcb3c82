"""An ONNX file as a model repository of NVIDIA Triton.

The fields are those of ``model_config.proto`` in triton-inference-server/common.
"""

import json
import shutil
import tempfile
from os.path import exists, isdir
from pathlib import Path

from ensemble_kit.errors import OutputError
from ensemble_kit.files import refuse_overwrite, removed_on_failure, written_aside
from ensemble_kit.serving.signature import Port, inputs_of, outputs_of
from ensemble_kit.store.dtypes import BY_NUMPY
from ensemble_kit.store.provenance import OnnxMetadata

MODEL = "model.onnx"  # what Triton looks for in the folder of a version
VERSION, CONFIG, LABELS = "1", "config.pbtxt", "labels.txt"
MAX_BATCH_SIZE = 32


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
            f"{home} cannot be written: {error.strerror}.", hint="Name a folder that you may write."
        ) from error


def write_repository(
    path: Path, metadata: OnnxMetadata, folder: Path, *, force: bool, keep_same: bool = False
) -> Path:
    """Lay out a model repository: ``<stem>/config.pbtxt``, ``labels.txt`` and ``1/model.onnx``.

    Where one of the files cannot be written, those that were not there before are removed again.

    Args:
        path: The ONNX file; it is copied.
        metadata: What the file says of itself, which its export has in hand.
        folder: The repository.
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
    texts = {
        home / LABELS: "".join(f"{' '.join(label.split())}\n" for label in metadata.label_names),
        home / CONFIG: repository_config(metadata, name=path.stem),
    }
    with removed_on_failure(*copies, *texts):
        for target, source in copies.items():
            with written_aside(target, force=force, keep_same=keep_same) as aside:
                shutil.copyfile(source, aside)
        for target, text in texts.items():
            with written_aside(target, force=force, keep_same=keep_same) as aside:
                aside.write_text(text, encoding="utf-8", newline="\n")
    return home / CONFIG


def repository_config(metadata: OnnxMetadata, *, name: str) -> str:
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
        "dynamic_batching { }",
    ]
    return "\n".join(lines) + "\n"


def _entry(kind: str, port: Port) -> str:
    """Describe an input or output without its batch, which ``max_batch_size`` stands for.

    Nothing may have no dimension, so what is one number a video is sent as ``(batch, 1)`` and
    given to the graph as ``(batch,)``.
    """
    sizes = ", ".join(str(-1 if isinstance(size, str) else size) for size in port.shape)
    fields = [f'name: "{port.name}"', f"data_type: TYPE_{BY_NUMPY[port.value_type].name.upper()}"]
    fields += [f"dims: [ {sizes} ]"] if port.shape else ["dims: [ 1 ]", "reshape: { shape: [ ] }"]
    if port.name == "probabilities":
        fields.append(f'label_filename: "{LABELS}"')
    return "\n".join([f"{kind} {{", *(f"  {field}" for field in fields), "}"])
