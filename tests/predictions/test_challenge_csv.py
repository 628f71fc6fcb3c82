"""Predictions and labels in the challenge's CSV format."""

import numpy as np
import pytest
from candidate_builders import write_text
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.file import is_predictions_file, read_predictions
from ensemble_kit.predictions.writing import write_predictions_csv

IDS = ("one", "zwei", "três")
ROWS = np.array(
    [[0.5, 0.25, 1.0, 0.0], [0.125, 0.125, 0.75, 0.125], [0.0, 1e-7, 0.1234567, 0.9]], np.float32
)


def test_the_challenge_csv_lists_the_best_classes_first(tmp_path):
    path = tmp_path / "submission.csv"

    write_predictions_csv(path, ids=IDS, rows=ROWS, top_k=3, force=False)

    assert path.read_text(encoding="utf-8") == (
        "VideoId,LabelConfidencePairs\n"
        "one,2 1 0 0.5 1 0.25\n"
        "zwei,2 0.75 0 0.125 1 0.125\n"
        "três,3 0.9 2 0.123457 1 1e-07\n"
    )


def test_a_csv_is_read_back_as_what_it_lists(tmp_path):
    path = tmp_path / "submission.csv"
    write_predictions_csv(path, ids=IDS, rows=ROWS, top_k=2, force=False)

    predictions = read_predictions(path)

    assert predictions.name == "submission"
    assert predictions.ids == IDS
    assert predictions.is_sparse
    assert (predictions.label_names, predictions.labels, predictions.metadata) == (None,) * 3
    assert predictions.num_classes == 4
    expected = np.full((3, 4), -np.inf)
    expected[[0, 0, 1, 1, 2, 2], [2, 0, 2, 0, 3, 2]] = [1, 0.5, 0.75, 0.125, 0.9, 0.123457]
    np.testing.assert_allclose(predictions.rows(0, 3), expected, rtol=1e-6)
    np.testing.assert_allclose(predictions.rows(1, 2), expected[1:2], rtol=1e-6)
    assert read_predictions(path, num_classes=6).rows(0, 1).shape == (1, 6)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(
            st.sampled_from("a,\"'") | st.characters(exclude_characters="\r\n", codec="utf-8"),
            min_size=1,
            max_size=3,
        ),
        st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5),
        min_size=1,
        max_size=4,
    )
)
def test_a_csv_of_every_class_keeps_six_digits_of_every_probability(tmp_path_factory, videos):
    path = tmp_path_factory.mktemp("csv") / "all.csv"
    rows = np.array(list(videos.values()), np.float32)

    write_predictions_csv(path, ids=tuple(videos), rows=rows, top_k=9, force=False)

    predictions = read_predictions(path)
    assert predictions.ids == tuple(videos)
    np.testing.assert_allclose(predictions.rows(0, len(rows)), rows, rtol=5.1e-6, atol=1e-44)


@pytest.mark.parametrize("header", ["VideoID,LabelConfidencePairs", "Id,Labels"])
def test_the_other_headers_in_use_are_read_too(tmp_path, header):
    path = write_text(tmp_path / "p.csv", header, "a,1 0.5")

    assert read_predictions(path).rows(0, 1).tolist() == [[-np.inf, 0.5]]


def test_a_csv_from_a_spreadsheet_is_read_too(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes("\ufeffVideoId,LabelConfidencePairs\r\na,1 0.5\r\nb,\r\n\r\n".encode())

    predictions = read_predictions(path)

    assert predictions.ids == ("a", "b")
    assert predictions.rows(0, 2).tolist() == [[-np.inf, 0.5], [-np.inf, -np.inf]]


def test_ids_in_quotation_marks_are_read_as_csv_says(tmp_path):
    path = write_text(
        tmp_path / "p.csv",
        "VideoId,LabelConfidencePairs",
        '"a",1 0.5',
        '"b, ""c""","0 0.25 1 0.5"',
        'd"e,1 0.125',
        '"f',
        'g","1 1"',
    )

    predictions = read_predictions(path)

    assert predictions.ids == ("a", 'b, "c"', 'd"e', "f\ng")
    assert predictions.rows(0, 4)[:, 1].tolist() == [0.5, 0.5, 0.125, 1.0]


def test_a_header_in_quotation_marks_is_read_too(tmp_path):
    path = write_text(tmp_path / "p", '"VideoId","LabelConfidencePairs"', '"a","1 0.5"')
    labels = write_text(tmp_path / "y", '"VideoId","Labels"', '"a","1 2"', '"b",""', '"a","3"')

    assert is_predictions_file(path)
    assert read_predictions(path).ids == ("a",)
    with pytest.raises(PredictionsError) as caught:
        read_labels_csv(labels)
    assert caught.value.problem == f"{labels}, line 4: video 'a' is on line 2 already."


def test_labels_are_separated_by_spaces_and_may_be_none(tmp_path):
    ids, labels = read_labels_csv(write_text(tmp_path / "y.csv", "VideoId,Labels", "a,3 1", "b,"))

    assert ids == ("a", "b")
    assert labels.offsets.tolist() == [0, 2, 2]
    assert labels.classes.tolist() == [1, 3]


def test_confidences_keep_every_digit_of_their_text(tmp_path):
    path = write_text(
        tmp_path / "p.csv", "VideoId,LabelConfidencePairs", "a,0 0.123456789 1 0.123456788"
    )

    rows = read_predictions(path).rows(0, 1)

    assert rows.tolist() == [[0.123456789, 0.123456788]]
    assert np.float32(0.123456789) == np.float32(0.123456788)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["video,labels", "a,1 0.5"],
            "{path}: the first line is 'video,labels', expected 'VideoId,LabelConfidencePairs'.\n"
            "Name a file in the challenge's format, with the header VideoId,LabelConfidencePairs.",
        ),
        (
            [""],
            "{path}: there is no header, expected 'VideoId,LabelConfidencePairs'.\n"
            "Name a file in the challenge's format, with the header VideoId,LabelConfidencePairs.",
        ),
        (
            ["VideoId,LabelConfidencePairs", ""],
            "{path} holds no videos.\nWrite one line for each video under the header.",
        ),
        (
            ["VideoId,LabelConfidencePairs", "", "a 1 0.5"],
            "{path}, line 3: there is no comma in 'a 1 0.5'.\n"
            "Write one line for each video: VideoId,LabelConfidencePairs.",
        ),
        (
            ["VideoId,LabelConfidencePairs", "a,1 0.5", "b,", "a,2 0.5"],
            "{path}, line 4: video 'a' is on line 2 already.\nKeep one line for each video.",
        ),
        (
            ["VideoId,LabelConfidencePairs", "a,1 0.5 2"],
            "{path}, line 2: 3 numbers for video 'a', expected pairs.\n"
            "Write `class confidence` pairs, separated by single spaces.",
        ),
        (
            ["VideoId,LabelConfidencePairs", "a,1 0.5 1 0.25"],
            "{path}, line 2: class 1 is listed twice.\nList each class of a video once.",
        ),
        *(
            (
                ["VideoId,LabelConfidencePairs", "b,1 0.5", f"a,{token} 0.5"],
                f"{{path}}, line 3: {token!r} is not a class, expected a number from 0 to 3.\n"
                "Number the classes from 0, as the records' labels do.",
            )
            for token in ("-1", "4", "1.0", "cat")
        ),
        *(
            (
                ["VideoId,LabelConfidencePairs", f"a,1 0.5 2 {token}"],
                f"{{path}}, line 2: {token!r} is not a confidence, expected a number from 0 to 1.\n"
                "Write probabilities, not logits or percentages.",
            )
            for token in ("-0.1", "1.01", "high")
        ),
        *(
            (
                ["VideoId,LabelConfidencePairs", f"a,1 0.5 2 {token}"],
                f"{{path}}, line 2: a confidence is {state} ('{token}').\n"
                "Predict again with a model whose weights and features are finite.",
            )
            for token, state in (("nan", "not a number"), ("-inf", "infinite"))
        ),
        (
            ["VideoId,LabelConfidencePairs", f"a,{'1' * 5000} 0.5"],
            f"{{path}}, line 2: '{'1' * 76}... is not a class, expected a number from 0 to 3.\n"
            "Number the classes from 0, as the records' labels do.",
        ),
        (
            ["VideoId,LabelConfidencePairs", '"a,1 0.5'],
            "{path}, line 2 is not CSV: unexpected end of data.\n"
            'Write an id with a comma or a quotation mark as "a ""b"", c".',
        ),
        (
            ["VideoId,LabelConfidencePairs", '"a",1 0.5,2 0.25'],
            "{path}, line 2: there are 3 fields, expected 2.\n"
            "Write one line for each video: VideoId,LabelConfidencePairs.",
        ),
    ],
)
def test_a_wrong_line_of_predictions_is_named_with_its_hint(tmp_path, lines, message):
    path = write_text(tmp_path / "p.csv", *lines)

    with pytest.raises(PredictionsError) as caught:
        read_predictions(path, num_classes=4)

    assert str(caught.value) == message.format(path=path)


def test_without_a_class_count_a_class_of_a_million_is_refused(tmp_path):
    path = write_text(tmp_path / "p.csv", "VideoId,LabelConfidencePairs", "a,1000000 0.5")

    with pytest.raises(PredictionsError) as caught:
        read_predictions(path)

    assert str(caught.value) == (
        f"{path}, line 2: '1000000' is not a class, expected a number from 0 to 999999.\n"
        "Number the classes from 0, as the records' labels do."
    )


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["VideoId,LabelConfidencePairs", "a,1"],
            "{path}: the first line is 'VideoId,LabelConfidencePairs', expected 'VideoId,Labels'.\n"
            "Name a file in the challenge's format, with the header VideoId,Labels.",
        ),
        (
            ["VideoId,Labels", "a,1 4"],
            "{path}, line 2: '4' is not a class, expected a number from 0 to 3.\n"
            "Number the classes from 0, as the records' labels do.",
        ),
        (
            ["VideoId,Labels", "a,2 1 2"],
            "{path}, line 2: class 2 is listed twice.\nList each class of a video once.",
        ),
        (
            ["VideoId,Labels", "a"],
            "{path}, line 2: there is no comma in 'a'.\n"
            "Write one line for each video: VideoId,Labels.",
        ),
    ],
)
def test_a_wrong_line_of_labels_is_named_with_its_hint(tmp_path, lines, message):
    path = write_text(tmp_path / "y.csv", *lines)

    with pytest.raises(PredictionsError) as caught:
        read_labels_csv(path, num_classes=4)

    assert str(caught.value) == message.format(path=path)
