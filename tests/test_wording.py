import pytest

from ensemble_kit.wording import counted, printable, printable_line


def test_a_number_stands_with_its_noun():
    assert counted(1, "member") == "1 member"
    assert counted(0, "member") == "0 members"
    assert counted(1234, "class", "classes") == "1,234 classes"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("três ü 視", "três ü 視"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("evil\u202egnp.exe", r"evil\u202egnp.exe"),
        ("a\rb\tc", r"a\rb\tc"),
        ("problem\nhint", "problem\nhint"),
        ("lone \udcff surrogate", r"lone \udcff surrogate"),
    ],
)
def test_what_steers_a_terminal_is_shown_as_its_escape(text, shown):
    assert printable(text) == shown


def test_a_row_of_a_table_stays_one_line():
    assert printable_line("a\nb\x1b[2J") == r"a\nb\x1b[2J"
