"""What rounding an ensemble's weights changes, measured on records.

One member at a time is in memory, exact or rounded.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import BATCH_SIZE
from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.metrics import MetricsAccumulator
from ensemble_kit.networks.member import MemberModel
from ensemble_kit.networks.running import runner
from ensemble_kit.progress import progress

BLOCK_BYTES = 2**28  # of records and probabilities held while members are loaded in turn
Rows = NDArray[np.float32]


class Forms(NamedTuple):
    """A member before and after rounding: functions that load it."""

    name: str
    coefficient: float
    exact: Callable[[], MemberModel]
    rounded: Callable[[], MemberModel]


class Loss(NamedTuple):
    """What rounding changed in an ensemble.

    Attributes:
        worst_change: The largest change of any probability.
        mean_change: The mean change of a probability, up or down.
        gap_before: GAP@k of the exact members on records; None where there were none.
        gap_after: GAP@k of the rounded members on the same records.
        num_videos: The number of videos that both were measured on.
    """

    worst_change: float
    mean_change: float
    gap_before: float | None = None
    gap_after: float | None = None
    num_videos: int = 0


def loss_on(
    records: Records,
    members: Sequence[Forms],
    *,
    k: int,
    batch_size: int = BATCH_SIZE,
    block_bytes: int = BLOCK_BYTES,
) -> Loss:
    """Run an ensemble before and after rounding on the same records, one draw a member.

    Args:
        records: The records, with labels.
        members: The members, in two forms each.
        k: How many classes of a video GAP looks at.
        batch_size: How many videos are run at a time.
        block_bytes: How much of records and probabilities is held while members are loaded.

    Raises:
        RecordError: A record is damaged.
    """
    before, after = (MetricsAccumulator(num_classes=records.schema.num_classes, k=k) for _ in "ab")
    worst, total, count, done = 0.0, 0.0, 0, 0
    with progress("compare", 0) as shown:
        for block in _blocks(records, batch_size, block_bytes):
            exact = _mixed(block, [(m.name, m.coefficient, m.exact) for m in members])
            rounded = _mixed(block, [(m.name, m.coefficient, m.rounded) for m in members])
            for batch, old, new in zip(block, exact, rounded, strict=True):
                before.add(old, batch.labels)
                after.add(new, batch.labels)
                change = np.abs(old - new)
                worst = max(worst, float(change.max()))
                total += float(change.sum(dtype=np.float64))
                count += change.size
                done += len(batch.ids)
            shown.update(done, "videos")
    return Loss(worst, total / count, before.result().gap, after.result().gap, done)


def _mixed(
    block: Sequence[Batch], members: Sequence[tuple[str, float, Callable[[], MemberModel]]]
) -> list[Rows]:
    """Return the mixed probabilities of each batch; members are loaded one after another."""
    mixed: list[Any] = [0.0] * len(block)
    for name, coefficient, load in members:
        model = load()
        run = runner(model, model.draws_for(name, repeats=1), "cpu")
        for index, batch in enumerate(block):
            mixed[index] += np.float32(coefficient) * run(batch)
    return mixed


def _blocks(records: Records, batch_size: int, block_bytes: int) -> Iterator[list[Batch]]:
    block: list[Batch] = []
    size = 0
    for batch in records.batches(batch_size):
        block.append(batch)
        size += sum(frames.nbytes for frames in batch.frames.values())
        size += 2 * 4 * len(batch.ids) * records.schema.num_classes
        if size >= block_bytes:
            yield block
            block, size = [], 0
    if block:
        yield block
