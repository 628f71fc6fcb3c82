"""The papers' equations as loops over scalars, written from the papers alone.

Slow on purpose: nothing here shares code, or a trick, with the kit.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import inf

# Metrics: google/youtube-8m, average_precision_calculator.py and eval_util.py. A score of -inf is
# no prediction. Ties rank by video order, then by class index: sorted() is stable, and its input
# is in that order. Fractions, so that two equal metrics are equal whatever the order of summing.

Scores = Sequence[Sequence[float]]
Positives = Sequence[set[int]]


def ranked_classes(scores: Sequence[float]) -> list[int]:
    """The predicted classes of one video, best first."""
    predicted = [index for index, score in enumerate(scores) if score > -inf]
    return sorted(predicted, key=lambda index: -scores[index])


def average_precision_loops(hits: Sequence[bool], num_positives: int) -> Fraction:
    """Precision at every hit of a ranking, summed, over the number of positives."""
    total, found = Fraction(0), 0
    for rank, is_hit in enumerate(hits, start=1):
        if is_hit:
            found += 1
            total += Fraction(found, rank)
    return total / num_positives if num_positives else Fraction(0)


def pool_loops(scores: Scores, k: int) -> list[tuple[float, int, int]]:
    """(score, video, class) of every video's k best classes, in video and then class order."""
    return [
        (video_scores[index], video, index)
        for video, video_scores in enumerate(scores)
        for index in sorted(ranked_classes(video_scores)[:k])
    ]


def gap_loops(scores: Scores, positives: Positives, k: int) -> Fraction:
    """Global average precision: one ranking of all pooled pairs."""
    pool = sorted(pool_loops(scores, k), key=lambda pair: -pair[0])
    hits = [index in positives[video] for _, video, index in pool]
    return average_precision_loops(hits, sum(len(one) for one in positives))


def hit_at_one_loops(scores: Scores, positives: Positives) -> Fraction:
    """The share of videos whose best class is a positive."""
    hits = 0
    for video_scores, video_positives in zip(scores, positives, strict=True):
        ranking = ranked_classes(video_scores)
        hits += bool(ranking) and ranking[0] in video_positives
    return Fraction(hits, len(scores))


def perr_loops(scores: Scores, positives: Positives) -> Fraction:
    """The mean over videos of the precision among the g best classes, g the number of labels."""
    total = Fraction(0)
    for video_scores, video_positives in zip(scores, positives, strict=True):
        g, found = len(video_positives), 0
        for index in ranked_classes(video_scores)[:g]:
            if video_scores[index] > 0 and index in video_positives:
                found += 1
        total += Fraction(found, g) if g else 0
    return total / len(scores)


def map_loops(scores: Scores, positives: Positives, k: int) -> Fraction:
    """The mean over classes with a positive of the average precision among surviving pairs."""
    pool = pool_loops(scores, k)
    precisions = []
    for wanted in set().union(*positives):
        ranking = sorted((pair for pair in pool if pair[2] == wanted), key=lambda pair: -pair[0])
        hits = [wanted in positives[video] for _, video, _ in ranking]
        num_positives = sum(wanted in one for one in positives)
        precisions.append(average_precision_loops(hits, num_positives))
    return sum(precisions, Fraction(0)) / len(precisions) if precisions else Fraction(0)
