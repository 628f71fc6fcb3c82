"""NumPy's files as predictions: what is read, and what is refused."""

import numpy as np
import pytest

from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.file import is_predictions_file, read_predictions

IDS = ["a", "b", "c"]
ROWS = np.array([[0.5, 0.25, 0.0, 1.0], [0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.7, 0.6]])
LABELS = np.array([[1, 0, 0, 2], [0, 0, 0, 0], [0, -1, 1, 0]])


def write_npy(path, rows=ROWS, ids=IDS):
    np.save(path, rows)
    if ids is not None:
        path.with_suffix(".ids.txt").write_text("\n".join(ids) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("form", ["C", "F", "stored", "compressed"])
def test_rows_are_read_in_any_order_from_any_form(tmp_path, dtype, form):
    rows = ROWS.astype(dtype)
    if form in ("C", "F"):
        path = write_npy(tmp_path / "p.npy", np.asarray(rows, order=form))
    else:
        path = tmp_path / "p.npz"
        save = np.savez if form == "stored" else np.savez_compressed
        save(path, labels=LABELS, ids=np.array(IDS), probabilities=rows, label_names=list("wxyz"))

    found = read_predictions(path)

    assert (found.name, found.ids, found.num_classes) == ("p", ("a", "b", "c"), 4)
    assert not found.is_sparse
    taken = found.taken(np.array([2, 0, 1]))
    assert taken.dtype == np.float32
    np.testing.assert_array_equal(taken, rows[[2, 0, 1]].astype(np.float32))
    if path.suffix == ".npz":
        assert found.label_names == ("w", "x", "y", "z")
        assert found.labels.offsets.tolist() == [0, 2, 2, 3]
        assert found.labels.classes.tolist() == [0, 3, 2]
    else:
        assert (found.label_names, found.labels) == (None, None)
    assert is_predictions_file(path)


def refused(path):
    with pytest.raises(PredictionsError) as caught:
        read_predictions(path).rows(0, 3)
    return str(caught.value)


def test_ids_belong_beside_a_matrix(tmp_path):
    path = write_npy(tmp_path / "p.npy", ids=None)

    assert refused(path) == (
        f"{path}: there are no video ids, expected p.ids.txt beside it.\n"
        "Write them there, one a line, in the order of the rows."
    )


def test_each_row_has_one_id(tmp_path):
    path = write_npy(tmp_path / "p.npy", ids=["a", "b"])

    assert refused(path) == (
        f"{tmp_path / 'p.ids.txt'}: ids have shape (2,), expected (3,) as the probabilities have.\n"
        "Save one row of probabilities for each video, one column for each class."
    )


def test_an_id_that_is_there_twice_is_named(tmp_path):
    path = write_npy(tmp_path / "p.npy", ids=["a", "b", "a"])

    assert refused(path) == (
        f"{path}: video id 'a' is there twice.\n"
        "Give every record an id of its own, without commas or line ends."
    )


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (ROWS[0], "float64 of shape (4,)"),
        (LABELS, "int64 of shape (3, 4)"),
        (ROWS[None], "float64 of shape (1, 3, 4)"),
    ],
)
def test_what_is_no_matrix_of_floating_point_numbers_is_named(tmp_path, rows, found):
    path = write_npy(tmp_path / "p.npy", rows)

    assert refused(path) == (
        f"{path}: the probabilities are {found}, expected floating-point numbers of shape (videos, "
        "classes).\n"
        "Save one row of probabilities for each video."
    )


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (1.5, "1.5"), (-0.25, "-0.25")])
def test_what_is_no_probability_is_named(tmp_path, value, shown):
    rows = ROWS.copy()
    rows[1, 2] = value
    path = write_npy(tmp_path / "p.npy", rows)

    assert refused(path) == (
        f"{path}: class 2 of video 'b' is {shown}, expected a probability from 0 to 1.\n"
        "Predict again with a model that returns probabilities, not logits."
    )


@pytest.mark.parametrize(
    ("arrays", "fault"),
    [
        ({"probabilities": ROWS}, "has no array 'ids', only probabilities."),
        ({"scores": ROWS, "ids": IDS}, "has no array 'probabilities', only scores, ids."),
        ({}, "has no array 'probabilities', only nothing."),
    ],
)
def test_an_array_that_is_missing_is_named(tmp_path, arrays, fault):
    path = tmp_path / "p.npz"
    np.savez(path, **arrays)

    assert refused(path) == (
        f"{path} {fault}\nSave it with np.savez(path, probabilities=..., ids=...)."
    )


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"ids": IDS[:2]}, "ids have shape (2,), expected (3,)"),
        ({"labels": LABELS[:, :3]}, "labels have shape (3, 3), expected (3, 4)"),
        ({"label_names": ["w"]}, "label_names have shape (1,), expected (4,)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changes, fault):
    path = tmp_path / "p.npz"
    np.savez(path, **({"probabilities": ROWS, "ids": IDS} | changes))

    assert refused(path) == (
        f"{path}: {fault} as the probabilities have.\n"
        "Save one row of probabilities for each video, one column for each class."
    )


def test_objects_and_damaged_files_are_refused(tmp_path):
    objects = write_npy(tmp_path / "o.npy", np.array([{}, {}]))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(b"PK\x03\x04")

    for path, reason in (
        (objects, "Object arrays cannot be loaded when allow_pickle=False"),
        (cut, "File is not a zip file"),
    ):
        assert refused(path) == (
            f"{path} is not a whole file of NumPy's: {reason}.\n"
            "Save it again with np.save or np.savez; objects are never unpickled."
        )


def test_a_matrix_that_was_cut_short_is_named(tmp_path):
    path = write_npy(tmp_path / "p.npy")
    path.write_bytes(path.read_bytes()[:-8])

    assert refused(path) == (
        f"{path} ends before its last row.\nMake the file again; it was cut short."
    )


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "none.npy") == (
        f"{tmp_path / 'none.npy'} cannot be read: No such file or directory.\n"
        "Name a file that you may read."
    )
