"""Words for people: numbers with their nouns, metrics, and names that cannot steer a terminal."""

from ensemble_kit.choices import SEGMENTS_PER_CLASS, Metric


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun: ``1 member``, ``2 members``, ``1,234 classes``.

    Args:
        number: How many there are.
        noun: The noun in the singular.
        plural: The noun in the plural, where an s is not enough.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def metric_name(metric: Metric, k: int | None = None) -> str:
    """Return what people call a metric: ``GAP``, ``GAP@20``, ``macro mAP``, ``MAP@100,000``.

    Args:
        metric: The metric.
        k: How many classes of each video count, where the metric does not count all; None leaves
            out any number.
    """
    name = {"gap": "GAP", "map": "mAP", "macro-map": "macro mAP", "map-at-k": "MAP"}[metric]
    if k is None or metric == "macro-map":
        return name
    return f"{name}@{SEGMENTS_PER_CLASS:,}" if metric == "map-at-k" else f"{name}@{k}"


def printable(text: str) -> str:
    r"""Return text with every character that is not printable as its escape: ``\x1b``, ``\u202e``.

    Names come from files that others made, and a terminal obeys what it is sent: it can be told to
    hide a line, to retitle its window, or to write from right to left. Line ends are kept, for the
    messages of errors have two lines.
    """
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character == "\n"
        else character.encode("unicode_escape").decode()
        for character in text
    )


def printable_line(text: str) -> str:
    """Return text as ``printable`` does, with its line ends as escapes too: a row of a table."""
    return printable(text).replace("\n", "\\n")
