"""Class-balanced sampling: how often each record comes in an epoch of training.

In a long tail of classes most records are of the few frequent ones. A record's rarity is that of
its rarest class, ``max_c N / n_c`` for N records of which ``n_c`` have class c, and it comes
``rarity ^ balance`` times as often as one that has the rarity 1: with 0 all come alike, with 1 the
classes do (by their rarest-class records), with 0.5 the square root between the two. That is the
square-root sampling of Mahajan et al. ("Exploring the limits of weakly supervised pretraining",
ECCV 2018, section 2.2) with the rule of LVIS for many labels: a record counts by the class that
asks for the most (Gupta et al., "LVIS", CVPR 2019, appendix B). Why not the sum over the classes:
then a record of many frequent classes comes as often as one of a rare class.

An epoch keeps its length: N turns are shared out, some records get none and some several. The
shares are whole numbers of ``1 / UNIT`` turns, so that an epoch's turns are N exactly.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.labels import LabelLists

UNIT = 1 << 32  # parts of a turn

T = TypeVar("T")


def turns_of(labels: LabelLists, num_classes: int, balance: float) -> NDArray[np.int64]:
    """Return how many turns each record has in an epoch, on average, in units of ``1 / UNIT``.

    Args:
        labels: The classes of N records; one without a class has the rarity 1.
        num_classes: C.
        balance: The power of a record's rarity, in [0, 1].

    Returns:
        ``(N,)``; their sum is ``N * UNIT``.
    """
    count = labels.num_videos
    num_positives = np.bincount(labels.classes, minlength=num_classes)
    rarity = np.ones(count)
    rows = np.repeat(np.arange(count), np.diff(labels.offsets))
    np.maximum.at(rarity, rows, count / num_positives[labels.classes])
    shares = rarity**balance
    turns: NDArray[np.int64] = np.floor(shares * (count * UNIT / shares.sum())).astype(np.int64)
    turns[np.argmax(turns)] += count * UNIT - turns.sum()  # what rounding left
    return turns


def repeated(items: Iterable[tuple[T, int]], start: int) -> Iterator[T]:
    """Yield each item as often as its turns say, on average over all starts.

    This is systematic sampling: the turns lie end to end, and an item is yielded for each whole
    turn that ends in its stretch, counted from ``start``. So an item that has 2.3 turns comes two
    or three times, never none, and all of them together come as often as their turns' sum.

    Args:
        items: Each with its turns, in units of ``1 / UNIT``.
        start: In [0, UNIT): where the first stretch begins.
    """
    end = start
    for item, turns in items:
        before, end = end, end + turns
        for _ in range(end // UNIT - before // UNIT):
            yield item


def by_shard(turns: NDArray[np.int64], counts: Sequence[int]) -> list[list[int]]:
    """Cut the turns of all records into those of each file."""
    return [part.tolist() for part in np.split(turns, np.cumsum(counts)[:-1])]
