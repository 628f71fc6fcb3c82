"""What an import is asked for."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from ensemble_kit.choices import Activation, FrameForm
from ensemble_kit.data.schema import Schema


class ImportPlan(BaseModel):
    """All that an import needs to know, so that it can be passed to another process as JSON.

    Attributes:
        model: The ONNX file.
        output: The file to write.
        data_schema: The modalities and classes of the records that the model will tag.
        name: The name of the model in predictions and selections.
        inputs: The inputs of the graph for each modality, or for several, joined by ``+``.
        num_frames: The input for the number of frames.
        is_frame: The input for the mask of frames.
        probabilities: The output with a number for each class; None where there is only one.
        frames: The form in which frames are given.
        activation: The function that turns the output into probabilities.
        lengths: Numbers of frames to prove the model on.
        force: Whether an existing file may be replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    output: Path
    data_schema: Schema
    name: str
    inputs: dict[str, tuple[str, ...]]
    num_frames: str | None
    is_frame: str | None
    probabilities: str | None
    frames: FrameForm
    activation: Activation
    lengths: tuple[int, ...]
    force: bool
