"""How the members were trained: the validation GAP of their runs' checkpoints."""

from dataclasses import dataclass
from pathlib import Path

from ensemble_kit.store.run_log import read_metrics
from ensemble_kit.store.selection_file import SelectionMetadata
from ensemble_kit.store.workspace import RunFolder


@dataclass(frozen=True)
class Curve:
    """The training of one member.

    Attributes:
        name: The member.
        steps: The steps of its checkpoints.
        gaps: The validation GAP@20 of each.
    """

    name: str
    steps: tuple[int, ...]
    gaps: tuple[float, ...]


def training_curves(selection: SelectionMetadata, folder: Path) -> list[Curve]:
    """Return the curves of the members whose runs lie beside their predictions.

    Args:
        selection: The selection.
        folder: The folder of its file, to which its paths are relative.

    Raises:
        TrainingError: A log cannot be read.
    """
    members = {member.name: member.predictions.path for member in selection.members}
    curves = []
    for name, path in members.items():
        lines = read_metrics(RunFolder((folder / path).parent).metrics)
        measured = [(line["step"], line["validation"]["gap"]) for line in lines
                    if "validation" in line]  # fmt: skip
        if measured:
            curves.append(Curve(name, *zip(*measured, strict=True)))
    return curves
