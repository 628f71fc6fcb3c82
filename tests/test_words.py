"""The words that the project does not use, searched for in all that people read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where to look; of the package that is its help, messages, docstrings and comments.
PLACES = (
    "ensemble_kit/**/*",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "examples/*",
    "benchmarks/*",
    "models/**/*",
    "tests/**/*",
)
TEXT = {".css", ".html", ".js", ".md", ".py", ".sh", ".toml"}
# A pattern of words that are not used, and what to write in their place.
INSTEAD = {
    "mend(s|ed|ing)?": "hint, or repair",
    "roads?": "pipeline",
    "so-manieth": "nth",
    "anew": "again",
    "(?<!left )(?<!leaves )(?<!leave )behind": "after",
    "the most bytes": "maximum size, in bytes",
    "of (its|their) own": "its own, their own",
    "faults?": "problem, or error",
}


def lines_to_change(text):
    """Return ``number: 'word'; write another`` for each word of the text that is not used."""
    return [
        f"{number}: {match[0]!r}; write {instead}"
        for number, line in enumerate(text.splitlines(), start=1)
        for word, instead in INSTEAD.items()
        for match in re.finditer(f"(?<![a-z]){word}(?![a-z])", line, re.IGNORECASE)
    ]


@pytest.mark.parametrize("place", PLACES)
def test_no_text_has_a_word_that_the_project_does_not_use(place):
    named = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.glob(place))}
    texts = {
        name: path.read_text(encoding="utf-8")
        for name, path in named.items()
        if path.suffix in TEXT and path != Path(__file__).resolve()
    }
    assert texts, f"{place} names no text"

    found = [f"{name}:{line}" for name, text in texts.items() for line in lines_to_change(text)]

    assert not found, "\n".join(found)


def test_each_word_is_found_with_its_line_and_no_other():
    text = "Recommend and amend; broad, threshold, left behind.\nThe ROAD ahead:\nraise X(mend=y)\n"
    text += "Begin anew, every so-manieth\nbatch, behind the layer.\n"
    text += "A default, in the most bytes.\nTheir faults, and a file of its own."

    assert lines_to_change(text) == [
        "2: 'ROAD'; write pipeline",
        "3: 'mend'; write hint, or repair",
        "4: 'so-manieth'; write nth",
        "4: 'anew'; write again",
        "5: 'behind'; write after",
        "6: 'the most bytes'; write maximum size, in bytes",
        "7: 'of its own'; write its own, their own",
        "7: 'faults'; write problem, or error",
    ]
