"""What each member's probabilities are multiplied by before they are summed."""

from collections.abc import Mapping, Sequence
from math import isfinite

from ensemble_kit.choices import Mixing
from ensemble_kit.errors import SelectionError
from ensemble_kit.selection.judging import Measure
from ensemble_kit.selection.scoring import Term
from ensemble_kit.selection.search import ROUNDING

FACTORS = (1.5, 1.2, 1.08, 1.03)  # what a coefficient is multiplied and divided by, in turn
MAX_ROUNDS = 8  # passes over all members, for each factor
SUM_TOLERANCE = 0.01  # of given coefficients, so that 0.33 may stand for a third


def search_weights(mixing: Mixing, singles: Sequence[float], fits: Sequence[bool]) -> list[float]:
    """Return the weight of each candidate during the search for members.

    Args:
        mixing: ``gap`` weights by the candidates' own scores, unless all that fit have a score of
            0; else all weights are equal. ``optimised`` begins when the members are known.
        singles: The candidates' own scores.
        fits: Which candidates fit in the limit by themselves.
    """
    has_hits = any(score > 0 for score, is_small in zip(singles, fits, strict=True) if is_small)
    if mixing == "gap" and has_hits:  # then the first member's is not 0, and no sum of them is
        return list(singles)
    return [1.0] * len(singles)


def given_weights(coefficients: Mapping[str, float]) -> dict[str, float]:
    """Return mixing coefficients that were given, scaled to sum to 1 exactly.

    Args:
        coefficients: The coefficient of each member, by name.

    Raises:
        SelectionError: One is not above 0, or their sum is not 1, 0.01 more or less.
    """
    for name, coefficient in coefficients.items():
        if not (isfinite(coefficient) and coefficient > 0):
            raise SelectionError(
                f"The coefficient of {name} is {coefficient:g}; it must be above 0.",
                hint="Leave out the --weight of a candidate that is to be no member.",
            )
    total = sum(coefficients.values())
    if abs(total - 1) > SUM_TOLERANCE:
        raise SelectionError(
            f"The coefficients given sum to {total:g}; they must sum to 1.",
            hint="Give every member its own, such as --weight gru=0.4 --weight vlad=0.6.",
        )
    return {name: coefficient / total for name, coefficient in coefficients.items()}


def optimised(measure: Measure, terms: Sequence[Term], score: float) -> list[Term]:
    """Return terms whose weights give a better score, by coordinate ascent; their sum is unchanged.

    One weight after the other is multiplied or divided by a factor if that raises the score, first
    by a large factor, then by smaller ones. A weight never becomes 0. There is no gradient to
    follow: a metric depends on the order of probabilities alone, so it is flat nearly everywhere,
    and rises in steps.

    Args:
        measure: What measures the terms.
        terms: A term for each member.
        score: The score of ``terms``.
    """
    best = list(terms)
    if len(terms) == 1:
        return best
    for factor in FACTORS:
        for _ in range(MAX_ROUNDS):
            before = score
            for place in range(len(best)):
                score = _ascend(measure, best, place, factor, score)
            if score <= before + ROUNDING:
                break
    scale = sum(term.weight for term in terms) / sum(term.weight for term in best)
    scaled = [term._replace(weight=term.weight * scale) for term in best]
    # Rounding may break or make a tie of scores, and ranks with it.
    return scaled if measure.score(scaled) >= measure.score(terms) else list(terms)


def _ascend(measure: Measure, terms: list[Term], place: int, factor: float, score: float) -> float:
    """Change one weight in place if that raises the score, and return the score then."""
    term = terms[place]
    changed = [term._replace(weight=term.weight * by) for by in (factor, 1 / factor)]
    others = [other for other in terms if other is not term]
    scores = measure.scores_with(others, changed)
    best, highest = max(zip(changed, scores, strict=True), key=lambda pair: pair[1])
    if highest <= score + ROUNDING:
        return score
    terms[place] = best
    return highest
