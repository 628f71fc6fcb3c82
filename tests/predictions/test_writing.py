"""What is written into predictions files, and what is not."""

import numpy as np
import pytest
from predictions_builders import IDS, LABELS, NAMES, ROWS, write, write_csv

from ensemble_kit.errors import OutputError, PredictionsError
from ensemble_kit.predictions.file import read_predictions


def test_blocks_and_a_whole_array_write_the_same_bytes(tmp_path):
    whole = write(tmp_path / "whole.safetensors")
    blocks = write(tmp_path / "blocks.safetensors", rows=iter([ROWS[:2], ROWS[2:]]))

    assert whole.read_bytes() == blocks.read_bytes()


def test_rounding_just_outside_of_probabilities_is_written_as_zero_or_one(tmp_path):
    path = tmp_path / "p.safetensors"
    rows = np.array([[1 + 2**-23, -1e-9]], np.float32)

    write(path, ids=("a",), label_names=("x", "y"), labels=LABELS.rows(1, 2), rows=rows)

    assert read_predictions(path).rows(0, 1).tolist() == [[1.0, 0.0]]


NOT_FINITE = "is {}.\nPredict again with a model whose weights and features are finite."


NOT_A_PROBABILITY = (
    "is {}, expected a probability from 0 to 1.\n"
    "Predict again with a model that returns probabilities, not logits."
)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (np.nan, NOT_FINITE.format("not a number (NaN)")),
        (np.inf, NOT_FINITE.format("infinite")),
        (-0.5, NOT_A_PROBABILITY.format("-0.5")),
        (1.5, NOT_A_PROBABILITY.format("1.5")),
    ],
)
def test_a_value_that_is_no_probability_is_named_when_written(tmp_path, value, problem):
    path = tmp_path / "p.safetensors"
    rows = ROWS.copy()
    rows[1, 3] = value

    with pytest.raises(PredictionsError) as caught:
        write(path, rows=rows)

    assert str(caught.value) == f"{path}: class 3 of video 'zwei' {problem}"
    assert not path.exists()


@pytest.mark.parametrize(
    ("write_ids", "ids", "problem"),
    [
        (write, ("a", "b", "a"), "'a' appears twice."),
        (write, ("a", "b\nc", "d"), r"'b\nc' has a character that the file cannot keep."),
        (write_csv, ("a", "b", "a"), "'a' appears twice."),
        (write_csv, ("a", "b\rc", "d"), r"'b\rc' has a character that the file cannot keep."),
        (write, ("a", "\ud800", "d"), r"'\ud800' has a character that the file cannot keep."),
    ],
)
def test_an_id_that_cannot_be_kept_is_named(tmp_path, write_ids, ids, problem):
    path = tmp_path / "p"

    with pytest.raises(PredictionsError) as caught:
        write_ids(path, ids=ids)

    assert str(caught.value) == (
        f"{path}: video id {problem}\n"
        "Give every record its own id, without line ends, in characters of Unicode."
    )


def test_counts_that_do_not_agree_are_refused(tmp_path):
    path = tmp_path / "p.safetensors"

    with pytest.raises(ValueError, match=r"^2 ids, labels of 3 videos$"):
        write(path, ids=IDS[:2])
    with pytest.raises(ValueError, match=r"^3 ids, probabilities of 2 videos$"):
        write(path, rows=ROWS[:2])
    with pytest.raises(ValueError, match=r"^3 label names, 4 probabilities$"):
        write(path, label_names=NAMES[:3])


def test_predictions_are_not_overwritten_unless_forced(tmp_path):
    for write_again, path in (
        (write, tmp_path / "p.safetensors"),
        (write_csv, tmp_path / "p.csv"),
    ):
        write_again(path)
        with pytest.raises(OutputError) as caught:
            write_again(path)
        write_again(path, force=True)
        assert str(caught.value) == (
            f"{path} exists already.\nName another output, or replace it with --force."
        )
