"""Import an ONNX file that another framework wrote as a file of the kit that can be a member."""

from pathlib import Path

from ensemble_kit.choices import ACTIVATION, FRAME_FORM, Activation, AnyPath, FrameForm
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import Schema
from ensemble_kit.files import refuse_overwrite, require_suffix
from ensemble_kit.foreign.conversion import ForeignFile
from ensemble_kit.foreign.limits import convert_in_child
from ensemble_kit.foreign.mapping import Inputs
from ensemble_kit.foreign.plan import ImportPlan
from ensemble_kit.foreign.proof import lengths_of


def import_onnx(
    model: AnyPath,
    output: AnyPath,
    *,
    schema: Schema,
    name: str,
    inputs: Inputs,
    num_frames: str | None = None,
    is_frame: str | None = None,
    probabilities: str | None = None,
    frames: FrameForm = FRAME_FORM,
    activation: Activation = ACTIVATION,
    records: Records | None = None,
    force: bool = False,
) -> ForeignFile:
    """Write a model that another framework made as a file that ``load`` opens like any other.

    The file holds the graph, raised to the kit's opset, its weights as tensors, and the mapping.
    Before it is kept, it is run beside the original file, with which it must agree, and on videos
    alone, whose probabilities must be the same as in a batch. All of this happens in a child
    process of limited time and memory.

    Args:
        model: The ONNX file.
        output: The ``.safetensors`` file to write.
        schema: The modalities and classes of the records that it will tag.
        name: The name of the model in predictions and selections.
        inputs: The graph's input or inputs for each modality, or for several side by side, such as
            ``{"rgb+audio": "x"}``. ``"x:channels-first"`` is an input ``(B, D, T)``. Modalities
            that an input is named after need not be given.
        num_frames: The graph's input for the number of frames of each video, ``(B,)``.
        is_frame: The graph's input for a mask ``(B, T)`` that tells frames from padding.
        probabilities: The graph's output ``(B, C)``; None where it has only one.
        frames: How frames are given: ``raw`` as records store them, ``dequantised`` to floating
            point, or ``normalised``, each joint frame to length 1. Padding is 0 in all of them.
        activation: The function that turns the output into probabilities.
        records: Records with videos as long as those that it will tag, to prove it on videos of
            their lengths; None proves it on videos of ``schema.max_frames``.
        force: Whether an existing file may be replaced.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix.
        ExportError: The ONNX file is not whole, or its values lie outside of its folder.
        ForeignModelError: The inputs cannot be mapped like this, or the output is not a probability
            for each class, depends on padding, or is not what the original computes.
        ProviderError: ONNX Runtime cannot open the file.
        CheckpointError: A weight holds NaN or infinity.
    """
    model, output = Path(model), Path(output)
    refuse_overwrite(output, force=force)
    require_suffix(output, ".safetensors")
    if records is not None:
        lengths = lengths_of(records)
    else:
        lengths = [schema.max_frames] if schema.level == "frame" else []
    plan = ImportPlan(
        model=model,
        output=output,
        data_schema=schema,
        name=name,
        inputs={
            modality: (value,) if isinstance(value, str) else tuple(value)
            for modality, value in inputs.items()
        },
        num_frames=num_frames,
        is_frame=is_frame,
        probabilities=probabilities,
        frames=frames,
        activation=activation,
        lengths=tuple(lengths),
        force=force,
    )
    return convert_in_child(plan)
