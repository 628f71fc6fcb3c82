import re

import pytest

from ensemble_kit.errors import (
    LONGEST_MESSAGE,
    EnsembleKitError,
    PredictionsError,
    RecordError,
    shown,
)
from ensemble_kit.texts import parse_json, parse_toml, read_text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 5_000, "it is nested too deeply"),
        (".".join(["a"] * 100_000) + " = 1", "it is nested too deeply"),
        ('"a" . ' * 64 + "a = 1", "it is nested too deeply"),
        ("a", "Expected '=' after a key in a key/value pair (at end of document)"),
    ],
)
def test_toml_that_cannot_be_read_is_one_kind_of_error(text, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        parse_toml(text)


def test_a_number_that_only_hexadecimal_can_hold_is_no_other_error():
    assert parse_toml("a = [0xff]") == {"a": [255]}
    with pytest.raises(ValueError, match="more than 4,300 digits"):
        parse_toml("[a]\nb = [0x" + "f" * 4_000 + "]")


@pytest.mark.parametrize("parse", [parse_toml, parse_json])
def test_numbers_that_python_does_not_read_are_no_other_error(parse):
    with pytest.raises(ValueError, match="more than 4,300 digits"):
        parse("a = " + "9" * 5_000 if parse is parse_toml else "9" * 5_000)


def test_json_that_is_nested_too_deeply_is_no_other_error():
    with pytest.raises(ValueError, match=r"^it is nested too deeply$"):
        parse_json("[" * 100_000)


def test_a_text_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"\xef\xbb\xbfa = 1\r\n")

    assert read_text(path, RecordError, hint="") == "a = 1\n"


def test_a_text_too_long_to_hold_is_refused(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text("a" * 11)

    with pytest.raises(RecordError) as error:
        read_text(path, RecordError, hint="", max_characters=10)

    assert str(error.value) == f"{path} has more than 10 characters.\nName another file."


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "'a\\nb'"),
        ("x" * 10**6, f"'{'x' * 76}..."),
        ([1] * 10**3, f"[{'1, ' * 25}1..."),
        (10**5_000, "a value too long to show (int)"),
    ],
    ids=["text", "long text", "list", "number"],
)
def test_a_value_is_shown_as_python_writes_it_and_cut(value, text):
    assert shown(value) == text


def test_a_message_neither_steers_a_terminal_nor_fills_it():
    error = EnsembleKitError(f"\x1b[2J{'x' * 10**6}end.", hint="Look\u202e here.")

    assert error.problem.startswith("\\x1b[2Jxxx")
    assert error.problem.endswith("xxxend.")
    assert len(str(error)) < LONGEST_MESSAGE + 100
    assert error.hint == "Look\\u202e here."
    assert str(PredictionsError("a", hint="b")) == "a\nb"
