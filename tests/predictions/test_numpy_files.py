"""NumPy's files as predictions: what is read, and what is refused."""

import io
import zipfile

import numpy as np
import pytest
from reference import gap_loops

from ensemble_kit.errors import PredictionsError
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.predictions.file import is_predictions_file, read_predictions
from ensemble_kit.predictions.numpy_files import MAX_UNPACKED, read_arrays

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
    assert taken.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_array_equal(taken, rows[[2, 0, 1]])
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
        "Write them there, one on each line, in the order of the rows."
    )


def test_each_row_has_one_id(tmp_path):
    path = write_npy(tmp_path / "p.npy", ids=["a", "b"])

    assert refused(path) == (
        f"{tmp_path / 'p.ids.txt'} has 2 ids, but {path} has 3 rows.\n"
        "Write one id for each row, in the order of the rows."
    )


def test_an_id_that_is_there_twice_is_named(tmp_path):
    path = write_npy(tmp_path / "p.npy", ids=["a", "b", "a"])

    assert refused(path) == (
        f"{path}: video id 'a' appears twice.\n"
        "Give every record its own id, without line ends, in characters of Unicode."
    )


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (ROWS[0], "float64 of shape (4,)"),
        (LABELS, "int64 of shape (3, 4)"),
        (ROWS[None], "float64 of shape (1, 3, 4)"),
        (ROWS.astype(np.longdouble), "float128 of shape (3, 4)"),
    ],
)
def test_what_is_no_matrix_of_floating_point_numbers_is_named(tmp_path, rows, found):
    path = write_npy(tmp_path / "p.npy", rows)

    assert refused(path) == (
        f"{path}: the probabilities are {found}, expected float16, float32 or float64 of shape "
        "(videos, classes).\n"
        "Save one row of probabilities for each video."
    )


@pytest.mark.parametrize(("value", "shown"), [(1.5, "1.5"), (-0.25, "-0.25")])
def test_what_is_no_probability_is_named(tmp_path, value, shown):
    rows = ROWS.copy()
    rows[1, 2] = value
    path = write_npy(tmp_path / "p.npy", rows)

    assert refused(path) == (
        f"{path}: class 2 of video 'b' is {shown}, expected a probability from 0 to 1.\n"
        "Predict again with a model that returns probabilities, not logits."
    )


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"probabilities": ROWS}, "has no member ids.npy, only probabilities.npy."),
        (
            {"scores": ROWS, "ids": IDS},
            "has no member probabilities.npy, only scores.npy, ids.npy.",
        ),
        ({}, "has no member probabilities.npy, only nothing."),
    ],
)
def test_an_array_that_is_missing_is_named(tmp_path, arrays, problem):
    path = tmp_path / "p.npz"
    np.savez(path, **arrays)

    assert refused(path) == (
        f"{path} {problem}\nSave it with np.savez(path, probabilities=..., ids=...)."
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ids": IDS[:2]}, "ids have shape (2,), expected (3,)"),
        ({"labels": LABELS[:, :3]}, "labels have shape (3, 3), expected (3, 4)"),
        ({"label_names": ["w"]}, "label_names have shape (1,), expected (4,)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, changes, problem):
    path = tmp_path / "p.npz"
    np.savez(path, **({"probabilities": ROWS, "ids": IDS} | changes))

    assert refused(path) == (
        f"{path}: {problem} for probabilities of shape (3, 4).\n"
        "Save one row of probabilities for each video, one column for each class."
    )


def test_objects_and_damaged_files_are_refused(tmp_path):
    objects = write_npy(tmp_path / "o.npy", np.array([[{}, {}]]))
    cut = tmp_path / "cut.npz"
    cut.write_bytes(b"PK\x03\x04")
    header = tmp_path / "header.npy"
    header.write_bytes(b"\x93NUMPY\x01\x00\x0a\x00{'descr': \n")

    for path, reason in (
        (header, "EOF in multi-line statement"),
        (objects, "it holds Python objects, which are never unpickled"),
        (cut, "File is not a zip file"),
    ):
        assert refused(path) == (
            f"{path} is not a whole NumPy file: {reason}.\nSave it again with np.save or np.savez."
        )


def npy_header(shape, descr="<f8"):
    """The bytes of a file of NumPy's that ends with its header."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def test_a_matrix_that_was_cut_short_is_named(tmp_path):
    path = write_npy(tmp_path / "p.npy")
    path.write_bytes(path.read_bytes()[:-8])

    assert refused(path) == (
        f"{path} is cut short: an array of shape (3, 4) takes 96 bytes, and 88 are there.\n"
        "Save the file again, or copy it again from where it is whole."
    )


@pytest.mark.parametrize("form", ["npy", "by columns", "compressed"])
def test_a_header_of_a_huge_matrix_takes_no_memory(tmp_path, form):
    shape = (3, 10**12)
    path = tmp_path / ("p.npz" if form == "compressed" else "p.npy")
    header = npy_header(shape)
    if form == "by columns":
        header = header.replace(b"False", b"True ")
    if form == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("probabilities.npy", header + bytes(8))
            archive.writestr("ids.npy", npy_header((3,), "<U1") + bytes(12))
    else:
        path.write_bytes(header + bytes(8))

    assert refused(path) == (
        f"{path} is cut short: an array of shape {shape} takes 24,000,000,000,000 bytes, and 8 are "
        "there.\n"
        "Save the file again, or copy it again from where it is whole."
    )


def test_compressed_arrays_are_unpacked_up_to_a_limit(tmp_path):
    path = tmp_path / "p.npz"
    np.savez_compressed(path, probabilities=np.zeros((3, 4)), ids=IDS, labels=LABELS)
    num_bytes = 3 * 128 + 3 * 4 * 8 + 3 * 4 + 3 * 4 * 8  # headers, probabilities, ids, labels

    assert read_arrays(path, max_unpacked=num_bytes).ids == ("a", "b", "c")
    with pytest.raises(PredictionsError) as caught:
        read_arrays(path, max_unpacked=num_bytes - 1)

    assert str(caught.value) == (
        f"{path} would unpack to {num_bytes} bytes; the limit is {num_bytes - 1} bytes.\n"
        "Save it with np.savez, which does not compress; it is then read from the disk."
    )
    np.savez(path, probabilities=np.zeros((3, 4)), ids=IDS, labels=LABELS)
    assert read_arrays(path, max_unpacked=0).matrix.shape == (3, 4)
    assert MAX_UNPACKED == 2**31


@pytest.mark.parametrize(
    ("changes", "problem", "hint"),
    [
        (
            {"labels": np.full((3, 4), "1")},
            "labels are of type <U1, expected numbers.",
            "Save a matrix that is greater than 0 where a class is a label of a video.",
        ),
        (
            {"ids": np.array([0.5, 1.5, 2.5])},
            "ids are of type float64, expected text.",
            "Save ids as an array of strings.",
        ),
        (
            {"label_names": np.ones(4)},
            "label_names are of type float64, expected text.",
            "Save label_names as an array of strings.",
        ),
        (
            {"labels": np.array([[0, 1, 0, 0], [0, 0, np.nan, 0], [1, 0, 0, 0]])},
            "the label of class 2 in row 1 is not a number (NaN).",
            "Save a matrix that is greater than 0 where a class is a label of a video.",
        ),
        (
            {"label_names": ["w", "x", "w", "z"]},
            "the name of class 2 is that of class 0 too.",
            "Save another name for each class in label_names.",
        ),
        (
            {"label_names": ["w", " ", "y", "z"]},
            "the name of class 1 is empty.",
            "Save another name for each class in label_names.",
        ),
    ],
)
def test_arrays_that_hold_something_else_are_named(tmp_path, changes, problem, hint):
    path = tmp_path / "p.npz"
    np.savez(path, **({"probabilities": ROWS, "ids": IDS} | changes))

    assert refused(path) == f"{path}: {problem}\n{hint}"


def test_ids_may_be_bytes_of_text_or_whole_numbers(tmp_path):
    path = tmp_path / "p.npz"
    for ids, expected in (
        (np.array(["é".encode(), b"b", b"c"]), ("é", "b", "c")),
        (np.array([7, 8, 9]), ("7", "8", "9")),
    ):
        np.savez(path, probabilities=ROWS, ids=ids)
        assert read_predictions(path).ids == expected


def test_members_without_the_suffix_and_damaged_members_are_named(tmp_path):
    path = tmp_path / "p.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("probabilities", b"anything")

    assert refused(path) == (
        f"{path} has no member probabilities.npy, only probabilities.\n"
        "Save it with np.savez(path, probabilities=..., ids=...)."
    )

    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("probabilities.npy", npy_header((3, 4)) + bytes(96))
        archive.writestr("ids.npy", npy_header((3,), "<U1") + "abc".encode("utf-32-le"))
    content = bytearray(path.read_bytes())
    content[30 + len("probabilities.npy")] |= 0b110  # a type of block that deflate does not have
    path.write_bytes(content)
    assert refused(path) == (
        f"{path} is not a whole NumPy file: Error -3 while decompressing data: invalid block type."
        "\nSave it again with np.save or np.savez."
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_ids_are_read_with_a_byte_order_mark_and_any_line_end(tmp_path, encoding, line_end):
    path = write_npy(tmp_path / "p.npy")
    ids = ("a", "b\u2028c", "d")
    path.with_suffix(".ids.txt").write_bytes(line_end.join(ids).encode(encoding))

    assert read_predictions(path).ids == ids


def test_what_only_float64_tells_apart_is_ranked(tmp_path):
    rng = np.random.default_rng(0)
    rows = 0.5 + 1e-12 * rng.standard_normal((30, 4))
    assert len(np.unique(rows.astype(np.float32))) == 1
    classes = rng.integers(0, 4, 30).tolist()
    ids = [f"v{number}" for number in range(30)]
    labels = "".join(f"{video},{index}\n" for video, index in zip(ids, classes, strict=True))
    (tmp_path / "labels.csv").write_text(f"VideoId,Labels\n{labels}")
    np.save(tmp_path / "p.npy", rows)
    (tmp_path / "p.ids.txt").write_text("\n".join(ids))
    np.savez(tmp_path / "p.npz", probabilities=rows, ids=np.array(ids))
    lines = (
        f"{video},{' '.join(f'{index} {value!r}' for index, value in enumerate(row))}\n"
        for video, row in zip(ids, rows.tolist(), strict=True)
    )
    (tmp_path / "p.csv").write_text(f"VideoId,LabelConfidencePairs\n{''.join(lines)}")
    gap = float(gap_loops(rows.tolist(), [[index] for index in classes], 4))

    for name in ("p.npy", "p.npz", "p.csv"):
        found = evaluate_predictions(
            read_predictions(tmp_path / name), tmp_path / "labels.csv", k=4
        )
        assert found.gap == pytest.approx(gap, abs=1e-12), name


def test_ids_may_all_be_in_quotes(tmp_path):
    path = write_npy(tmp_path / "p.npy")
    ids = path.with_suffix(".ids.txt")

    ids.write_text('"a"\n"b,c"\n"d"\n')
    assert read_predictions(path).ids == ("a", "b,c", "d")

    ids.write_text('"a"\nb\n"d"\n')  # so these are part of the names
    assert read_predictions(path).ids == ('"a"', "b", '"d"')


def test_ids_in_another_encoding_are_blamed_on_their_own_file(tmp_path):
    path = write_npy(tmp_path / "p.npy")
    path.with_suffix(".ids.txt").write_bytes("a\nb\nc\n".encode("utf-16"))

    assert refused(path) == (
        f"{tmp_path / 'p.ids.txt'} is not text in UTF-8.\nSave it as UTF-8, one id on each line."
    )


@pytest.mark.parametrize(("value", "shown"), [(np.nan, "not a number (NaN)"), (np.inf, "infinite")])
def test_what_is_not_finite_is_not_called_a_logit(value, shown, tmp_path):
    rows = ROWS.copy()
    rows[1, 2] = value

    path = write_npy(tmp_path / "p.npy", rows)

    assert refused(path) == (
        f"{path}: class 2 of video 'b' is {shown}.\n"
        "Predict again with a model whose weights and features are finite."
    )


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "none.npy") == (
        f"{tmp_path / 'none.npy'} cannot be read: No such file or directory.\n"
        "Name a file that you may read."
    )
