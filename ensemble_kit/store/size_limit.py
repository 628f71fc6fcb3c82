"""The size limit of a file, and what would fit it."""

from ensemble_kit.choices import Dtype
from ensemble_kit.errors import SizeLimitError
from ensemble_kit.files import format_size
from ensemble_kit.store.selection_file import FrontierMetadata, SelectionMetadata


def refuse_size(
    kind: str,
    num_bytes: int,
    max_size: int,
    *,
    selection: SelectionMetadata | None,
    dtype: Dtype,
    overhead: int = 0,
) -> None:
    """Raise if the files needed to run an ensemble are over the limit.

    Args:
        kind: What the message calls the file: ``fused`` or ``ONNX``.
        num_bytes: The size of all files that are needed to run it.
        max_size: Their maximum size together, in bytes.
        selection: The selection of the members; None if it is not available.
        dtype: The type that weights are stored in.
        overhead: The bytes that are not weights of a member.

    Raises:
        SizeLimitError: The size is over the limit.
    """
    if num_bytes <= max_size:
        return
    excess, room = num_bytes - max_size, max_size - overhead
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
    fit = best_that_fits(selection, dtype, room)
    if fit is None:
        raise SizeLimitError(
            f"{problem} Nothing that selection measured would fit in {dtype}.",
            hint="Train smaller members, fuse in a smaller --dtype, or raise --max-size here.",
        )
    raise SizeLimitError(
        f"{problem} Of what selection measured, {' + '.join(fit.members)} would fit and score "
        "best: "
        f"GAP@{selection.k} {fit.gap:.4f} in {format_size(fit.bytes, like=max_size)}.",
        hint=f"Select and fuse again with --dtype {dtype} --max-size {room}, or raise --max-size "
        "here.",
    )


def best_that_fits(
    selection: SelectionMetadata, dtype: Dtype, room: int
) -> FrontierMetadata | None:
    """Return the best ensemble of a selection's frontier whose members take at most ``room``.

    Returns:
        Its ``bytes`` are those in ``dtype``; None where nothing fits.
    """
    sizes = {
        one.name: one.bytes_by_dtype[dtype]
        for one in selection.candidates
        if one.bytes_by_dtype is not None
    }
    fits = []
    for one in selection.frontier:
        names = set(one.members)  # one that was added twice is stored once
        if dtype != selection.dtype and not names <= sizes.keys():
            continue
        num_bytes = one.bytes
        if dtype != selection.dtype:
            num_bytes = sum(sizes[name] for name in names)
        if num_bytes <= room:
            fits.append(one.model_copy(update={"bytes": num_bytes}))
    return max(fits, key=lambda one: one.gap, default=None)
