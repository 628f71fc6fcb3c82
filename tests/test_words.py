"""The words that the project does not use, searched for in all that people read."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Where to look. "ensemble_kit/**/*" adds the package: its help, messages, docstrings and comments.
PLACES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "examples/*",
    "benchmarks/*",
    "models/**/*",
)
TEXT = {".css", ".html", ".js", ".md", ".py", ".sh", ".toml"}
# A pattern of words that are not used, and what to write in their place.
INSTEAD = {
    "mend(s|ed|ing)?": "hint, or repair",
    "roads?": "pipeline",
    "so-manieth": "nth",
    "anew": "again",
    "(?<!left )(?<!leaves )(?<!leave )behind": "after",
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
    paths = sorted(path for path in ROOT.glob(place) if path.suffix in TEXT)
    assert paths, f"{place} names no text"

    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        for line in lines_to_change(path.read_text(encoding="utf-8"))
    ]

    assert not found, "\n".join(found)


def test_each_word_is_found_with_its_line_and_no_other():
    text = "Recommend and amend; broad, threshold, left behind.\nThe ROAD ahead:\nraise X(mend=y)\n"
    text += "Begin anew, every so-manieth\nbatch, behind the layer."

    assert lines_to_change(text) == [
        "2: 'ROAD'; write pipeline",
        "3: 'mend'; write hint, or repair",
        "4: 'so-manieth'; write nth",
        "4: 'anew'; write again",
        "5: 'behind'; write after",
    ]
