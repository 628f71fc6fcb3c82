"""The size limit of a file, and what would fit it."""

from collections.abc import Sequence

from ensemble_kit.choices import DTYPES_OF_AUTO, Dtype
from ensemble_kit.errors import SizeLimitError
from ensemble_kit.files import format_size
from ensemble_kit.store.provenance import MemberMetadata
from ensemble_kit.store.selection_file import FrontierMetadata, SelectedMetadata, SelectionMetadata


def refuse_size(
    kind: str,
    num_bytes: int,
    max_size: int,
    *,
    members: Sequence[MemberMetadata],
    selection: SelectionMetadata | None,
    overhead: int = 0,
) -> None:
    """Raise if the files needed to run an ensemble are over the limit.

    Args:
        kind: What the message calls the file: ``fused`` or ``ONNX``.
        num_bytes: The size of all files that are needed to run it.
        max_size: Their maximum size together, in bytes.
        members: Its members, in the precisions that they are stored in.
        selection: The selection of the members; None if it is not available.
        overhead: What the files take beyond a fused file of the same members.

    Raises:
        SizeLimitError: The size is over the limit.
    """
    if num_bytes <= max_size:
        return
    excess = num_bytes - max_size
    problem = (
        f"The {kind} file has {num_bytes:,} bytes ({format_size(num_bytes, like=max_size)}), "
        f"{excess:,} bytes ({format_size(excess, like=max_size)}) over the limit of "
        f"{format_size(max_size)}."
    )
    if selection is None:
        raise SizeLimitError(
            problem,
            hint="Select and fuse again with a smaller --max-size, or raise --max-size here.",
        )
    room = max_size - overhead
    advice = _Advice(selection, {member.name: member.dtype for member in members}, room)
    hints = []
    if len(members) > 1:
        problem += f" {advice.least_missed()}"
    for dtype, size in advice.finest_that_fits():
        problem += f" In {dtype} all would fit, in {format_size(size, like=max_size)}."
        hints.append(f"fuse with --dtype {dtype}")
    fit = best_that_fits(selection, room)
    if fit is not None:
        names = map(selection.label, fit.members, fit.dtypes)
        problem += (
            f" Of what selection measured, {' + '.join(names)} would fit and score best: "
            f"{selection.metric_name} {fit.score:.4f} in {format_size(fit.bytes, like=max_size)}."
        )
        hints.append(f"select again with --max-size {room}")
    hint = ", ".join([*(hints or ["train smaller members"]), "or raise --max-size here."])
    raise SizeLimitError(problem, hint=hint[0].upper() + hint[1:])


class _Advice:
    """What could be done about an ensemble that is too large.

    Attributes:
        dtypes: The precision of each member, by name.
    """

    def __init__(self, selection: SelectionMetadata, dtypes: dict[str, Dtype], room: int) -> None:
        self.dtypes = dtypes
        self._selection, self._room = selection, room
        self._members = [member for member in selection.members if member.name in dtypes]

    def num_bytes(self, dtypes: dict[str, Dtype]) -> int | None:
        """Return what a fused file of some members takes; None where that is not known."""
        sizes = [_size(each, dtypes[each.name]) for each in self._members if each.name in dtypes]
        known = [size for size in sizes if size is not None]
        return self._selection.shared_bytes + sum(known) if len(known) == len(sizes) else None

    def least_missed(self) -> str:
        """Say without which member the ensemble loses the least, of those that make it fit."""
        fitting = [each for each in self._members if self._fits_without(each)]
        member = max(fitting or self._members, key=lambda each: each.score_without)
        score, metric = member.score_without, self._selection.metric_name
        loss = f"{metric} {score:.4f}, {self._selection.score - score:.4f} less"
        if not fitting:
            return f"Without {member.name} it would lose the least ({loss}), but not fit."
        return f"Without {member.name} it would fit and lose the least: {loss}."

    def finest_that_fits(self) -> list[tuple[Dtype, int]]:
        """Return the finest precision in which all members fit, if any, and their size in it."""
        sizes = [
            (dtype, self.num_bytes(dict.fromkeys(self.dtypes, dtype))) for dtype in DTYPES_OF_AUTO
        ]
        return [(dtype, size) for dtype, size in sizes if size and size <= self._room][:1]

    def _fits_without(self, member: SelectedMetadata) -> bool:
        left = {name: dtype for name, dtype in self.dtypes.items() if name != member.name}
        size = self.num_bytes(left)
        return size is not None and size <= self._room


def _size(member: SelectedMetadata, dtype: Dtype) -> int | None:
    sizes = member.model.bytes_by_dtype if member.model is not None else None
    return None if sizes is None else sizes[dtype]


def best_that_fits(selection: SelectionMetadata, room: int) -> FrontierMetadata | None:
    """Return the best ensemble of a selection's frontier that fits; None where nothing does."""
    fits = [each for each in selection.frontier if each.bytes <= room]
    return max(fits, key=lambda each: each.score, default=None)
