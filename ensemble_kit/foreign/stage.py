"""Import: an ONNX file that another framework wrote, as a file of the kit that can be a member."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ensemble_kit._version import __version__
from ensemble_kit.choices import ACTIVATION, FRAME_FORM, Activation, FrameForm
from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.files import refuse_overwrite
from ensemble_kit.foreign.checks import check_inputs, prove
from ensemble_kit.foreign.onnx_source import read_foreign
from ensemble_kit.networks.foreign import GRAPH, WEIGHTS, ForeignModel
from ensemble_kit.networks.storage import is_finite
from ensemble_kit.networks.weights import not_finite
from ensemble_kit.serving.onnx_file import OPSET
from ensemble_kit.store.provenance import (
    FileMetadata,
    ForeignMetadata,
    InputMetadata,
    MappingMetadata,
)
from ensemble_kit.store.tensor_files import save_tensors


@dataclass(frozen=True)
class ForeignFile:
    """A file that has passed its proofs.

    Attributes:
        path: Where it lies.
        name: What predictions and selections call the model.
        num_values: Numbers that ``fuse`` will store for it.
        worst_difference: The largest difference of any probability from the original file's.
    """

    path: Path
    name: str
    num_values: int
    worst_difference: float


def import_onnx(
    model: Path,
    output: Path,
    *,
    schema: Schema,
    name: str,
    inputs: Mapping[str, str],
    num_frames: str | None = None,
    is_frame: str | None = None,
    probabilities: str | None = None,
    frames: FrameForm = FRAME_FORM,
    activation: Activation = ACTIVATION,
    force: bool = False,
) -> ForeignFile:
    """Write a model that another framework made as a file that ``load`` opens like any other.

    The file holds the graph, raised to the kit's opset, its weights as tensors, and the mapping. It
    is run beside the original file, which it must agree with, and on videos alone, whose
    probabilities must be those that they have in a batch.

    Args:
        model: The ONNX file.
        output: The ``.safetensors`` file to write.
        schema: What the records hold that it is to tag.
        name: What predictions and selections will call it.
        inputs: The graph's input for each modality, or for several side by side: ``rgb+audio``.
            Modalities whose name is that of an input need not be named.
        num_frames: The graph's input for the number of frames of each video, ``(B,)``.
        is_frame: The graph's input that tells frames from padding, ``(B, T)``.
        probabilities: The graph's output ``(B, C)``; None where it has one only.
        frames: What frames are given as: ``raw`` as records store them, ``dequantised`` to floating
            point, or ``normalised``, each joint frame to length 1. Padding is 0 in all of them.
        activation: What makes probabilities of the output.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``output`` exists and ``force`` is False.
        ExportError: The ONNX file is not whole, or its values lie outside of its folder.
        ForeignModelError: It cannot be mapped so, or what it computes is not a probability for each
            class, depends on padding, or is not what the original computes.
        CheckpointError: A weight holds NaN or infinity.
    """
    refuse_overwrite(output, force=force)
    foreign = read_foreign(model, output=probabilities, opset=OPSET)
    mapped = _mapped(model, foreign.inputs, schema, inputs, num_frames, is_frame)
    record = ForeignMetadata(
        kit_version=__version__,
        name=name,
        mapping=MappingMetadata(frames=frames, inputs=mapped, activation=activation),
        data_schema=schema,
        onnx=FileMetadata.of(model, output.parent),
    )
    imported = ForeignModel(foreign.graph, record.mapping, schema, name=str(model))
    check_inputs(imported, model)
    imported.weights = {each: foreign.tensor(each) for each in foreign.weights}
    tensors = {WEIGHTS + each: tensor for each, tensor in imported.weights.items()}
    for each, tensor in tensors.items():
        if not is_finite(tensor):
            raise not_finite(model, each.removeprefix(WEIGHTS))
    worst = prove(imported, model, probabilities)
    graph = np.frombuffer(foreign.graph.SerializeToString(), np.uint8).copy()
    tensors[GRAPH] = torch.from_numpy(graph)
    save_tensors(output, tensors, record, force=force)
    return ForeignFile(output, name, sum(map(torch.numel, tensors.values())), worst)


def _mapped(
    path: Path,
    asked: Sequence[str],
    schema: Schema,
    inputs: Mapping[str, str],
    num_frames: str | None,
    is_frame: str | None,
) -> tuple[InputMetadata, ...]:
    """Return what each input is given; those that are called like a modality need no words."""
    records = {}
    for names, value in inputs.items():
        modalities = tuple(names.split("+"))
        for modality in modalities:
            if modality not in schema.widths:
                raise ForeignModelError(
                    f"{modality!r} is not a modality of these records, which hold "
                    f"{', '.join(schema.widths)}.",
                    hint=f"Use --input MODALITY={value} with one of them, or with several: "
                    f"{'+'.join(schema.widths)}={value}.",
                )
        records[value] = InputMetadata(name=value, holds="frames", modalities=modalities)
    if num_frames is not None:
        records[num_frames] = InputMetadata(name=num_frames, holds="num_frames")
    if is_frame is not None:
        records[is_frame] = InputMetadata(name=is_frame, holds="is_frame")
    for name in set(schema.widths) & set(asked) - set(records):
        records[name] = InputMetadata(name=name, holds="frames", modalities=(name,))
    for name in records:
        if name not in asked:
            raise ForeignModelError(
                f"{path} has no input {name!r} that its output depends on; it has "
                f"{', '.join(asked)}.",
                hint="Map these, and no other.",
            )
    for name in asked:
        if name not in records:
            raise ForeignModelError(
                f"{path} asks for the input {name}, and nothing is mapped to it.",
                hint=f"Add --input MODALITY={name}, --num-frames {name} or --is-frame {name}.",
            )
    return tuple(records[name] for name in asked)
