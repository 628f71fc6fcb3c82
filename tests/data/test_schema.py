import gzip

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_kit.data.schema import (
    Modality,
    Schema,
    read_label_names,
    read_schema,
    write_schema,
)
from ensemble_kit.errors import OutputError, RecordError, shown

TOML = """\
level = "frame"
id_key = "id"
labels_key = "labels"
num_classes = 3

[[modalities]]
name = "rgb"
key = "rgb"
width = 4
value_type = "uint8"
"""
WRITE_EACH = "Write each class once under one header: its index first, its own name last."

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
modality = st.builds(
    Modality,
    name=st.from_regex(r"[a-z][a-z0-9_]{0,4}", fullmatch=True),
    key=text,
    width=st.integers(1, 8),
    value_type=st.sampled_from(["uint8", "float32"]),
)
schema = st.integers(1, 4).flatmap(
    lambda num_classes: st.builds(
        Schema,
        level=st.sampled_from(["frame", "video"]),
        modalities=st.lists(modality, min_size=1, max_size=3, unique_by=lambda m: m.name),
        id_key=text,
        labels_key=text,
        num_classes=st.just(num_classes),
        max_frames=st.integers(1, 300),
        frames_per_second=st.floats(0.1, 100),
        label_names=st.none() | st.lists(text, min_size=num_classes, max_size=num_classes),
    )
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(TOML)
    return path


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    return tmp_path_factory.mktemp("schemas") / "schema.toml"


@settings(deadline=None, max_examples=50)
@given(schema)
def test_a_written_schema_reads_back_equal(module_path, schema):
    write_schema(schema, module_path, force=True)

    assert read_schema(module_path) == schema


def test_label_names_may_lie_in_a_file_beside_the_schema(path):
    names = path.with_name("names.csv")
    names.write_text("label_id,label_name\n0,a\n1,b\n2,c\n")
    schema = read_schema(path).with_label_names(names)

    write_schema(schema, path, label_names_file="names.csv", force=True)

    assert 'label_names = "names.csv"' in path.read_text()
    assert read_schema(path) == schema
    assert schema.names == ("a", "b", "c")


@settings(deadline=None, max_examples=20)
@given(schema)
def test_values_by_modality_are_put_in_the_schemas_order(schema):
    names = [modality.name for modality in schema.modalities]

    found = schema.ordered({name: name.upper() for name in ["7", *reversed(names)]})

    assert list(found.items()) == [(name, name.upper()) for name in names]


def test_an_existing_schema_is_kept(path):
    with pytest.raises(OutputError, match="exists already"):
        write_schema(read_schema(path), path, force=False)

    assert path.read_text() == TOML


@pytest.mark.parametrize(
    ("line", "replacement", "problem", "hint"),
    [
        (
            "width = 4",
            "widht = 4",
            ": modalities[0].widht is not a key of a schema (did you mean 'width'?).",
            "Use one of the keys: name, key, width, value_type.",
        ),
        (
            "num_classes = 3",
            "num_classes = 3\npurpose = 1",
            ": purpose is not a key of a schema.",
            "Use one of the keys: level, modalities, id_key, labels_key, num_classes, max_frames, "
            "frames_per_second, label_names.",
        ),
        ('id_key = "id"', "", ": id_key is missing.", "Give id_key a value."),
        ('key = "rgb"', "", ": modalities[0].key is missing.", "Give modalities[0].key a value."),
        (
            'level = "frame"',
            'level = "clip"',
            ": level is 'clip': Input should be 'frame' or 'video'.",
            "Give level a value of the right type and range.",
        ),
        (
            "width = 4",
            "width = 0",
            ": modalities[0].width is 0: Input should be greater than or equal to 1.",
            "Give modalities[0].width a value of the right type and range.",
        ),
        (
            "num_classes = 3",
            'num_classes = 3\nlabel_names = ["a"]',
            ": 1 label names for 3 classes.",
            "Correct the file.",
        ),
        (
            "[[modalities]]",
            '[[modalities]]\nname = "rgb"\nkey = "a"\nwidth = 2\nvalue_type = "uint8"\n'
            "[[modalities]]",
            ": two modalities share a name: rgb, rgb.",
            "Correct the file.",
        ),
        *(
            (
                'name = "rgb"',
                f'name = "{name}"',
                f": no modality may be named {name}, as the models' files use it.",
                "Correct the file.",
            )
            for name in ("num_frames", "probabilities", "labels", "confidences")
        ),
        (
            "num_classes = 3",
            "num_classes = ",
            " is not TOML: Invalid value (at line 4, column 15).",
            "Correct the file.",
        ),
        (
            "num_classes = 3",
            'num_classes = 3\nlabel_names = "no.csv"',
            None,
            "Name a CSV file of classes that exists.",
        ),
    ],
)
def test_a_problem_of_a_schema_is_named_with_its_place(path, line, replacement, problem, hint):
    assert line in TOML
    path.write_text(TOML.replace(line, replacement, 1))

    with pytest.raises(RecordError) as error:
        read_schema(path)

    expected = f"{path.with_name('no.csv')} cannot be read: No such file or directory."
    assert str(error.value) == f"{expected if problem is None else f'{path}{problem}'}\n{hint}"


def test_a_missing_schema_is_an_error(tmp_path):
    with pytest.raises(RecordError) as error:
        read_schema(tmp_path / "no.toml")

    assert str(error.value) == (
        f"{tmp_path / 'no.toml'} cannot be read: No such file or directory.\n"
        "Name a schema TOML that exists."
    )


def test_a_schema_of_other_bytes_than_text_is_an_error(path):
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(RecordError) as error:
        read_schema(path)

    assert str(error.value) == f"{path} is not text in UTF-8.\nSave the file as UTF-8."


def test_label_names_come_by_index_from_the_last_column(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text('index,mid,display_name\n2,/m/c,"c, quoted"\n\n0,/m/a,a\n1,/m/b,b\n')

    assert read_label_names(path, 3) == ("a", "b", "c, quoted")


def test_commas_that_nobody_quoted_are_part_of_the_name(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text("label_id,label_name\n0,Nike, Inc.\n1,Car\n")

    assert read_label_names(path, 2) == ("Nike, Inc.", "Car")


VOCABULARY = (
    "\ufeffIndex,TrainVideoCount,KnowledgeGraphId,Name,WikiUrl,Vertical1,Vertical2,Vertical3,"
    "WikiDescription\n"
    '1,9,/m/01,"Nike, Inc.",https://w/N,Shopping,,,"Makes shoes, and more.\nMuch more."\n'
    "0,10,/m/00,Game,https://w/G,Games,,,\n"
)


def test_youtube8ms_own_vocabulary_has_its_names_in_the_column_name(tmp_path):
    path = tmp_path / "vocabulary.csv"
    path.write_text(VOCABULARY, encoding="utf-8")

    assert read_label_names(path, 2) == ("Game", "Nike, Inc.")
    assert read_label_names(path) == ("Game", "Nike, Inc.")


def test_a_class_of_youtube8ms_vocabulary_without_a_name_is_refused_by_its_line(tmp_path):
    path = tmp_path / "vocabulary.csv"
    path.write_text(VOCABULARY.replace("Game,", ",", 1), encoding="utf-8")

    with pytest.raises(RecordError) as error:
        read_label_names(path, 2)

    assert str(error.value) == (
        f"{path}, line 4: found '0,10,/m/00,,https://w/G,Games,,,', which gives class 0 no name.\n"
        f"{WRITE_EACH}"
    )


def test_a_plain_list_names_the_classes_in_order(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text('Game\r\nNike, Inc.\r\n"Dance, modern"\r\n99 Luftballons\r\n\r\n')

    names = ("Game", "Nike, Inc.", "Dance, modern", "99 Luftballons")
    assert read_label_names(path, 4) == read_label_names(path) == names
    path.write_text("only\n")
    assert read_label_names(path) == ("only",)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("a\n\nb\n", 2, "found '', which gives class 1 no name"),
        ("a\nb\n b\n", 3, "found ' b', whose name class 1 has already"),
        ("a\nb\nc\nd\n", 4, "found 'd', but the list has the names of 3 classes already"),
    ],
)
def test_a_line_of_a_plain_list_that_names_no_class_is_refused(tmp_path, content, line, problem):
    path = tmp_path / "names.txt"
    path.write_text(content)

    with pytest.raises(RecordError) as error:
        read_label_names(path, 3)

    assert str(error.value) == (
        f"{path}, line {line}: {problem}.\n"
        "Write the name of each class on its own line, in the order of the classes."
    )


@pytest.mark.parametrize("content", [VOCABULARY, "Game\nCar\n"])
def test_names_may_be_gzipped(tmp_path, content):
    path, packed = tmp_path / "names.csv", tmp_path / "names.csv.gz"
    path.write_text(content, encoding="utf-8")
    packed.write_bytes(gzip.compress(path.read_bytes()))

    assert read_label_names(packed, 2) == read_label_names(path, 2)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("1,", "which gives class 1 no name"),
        ("1,  ", "which gives class 1 no name"),
        ("1,a", "whose name class 0 has already"),
        (f"{'9' * 5000},b", "expected an index from 0 to 2 that no line above has, and a name"),
    ],
)
def test_a_name_that_tells_no_class_apart_is_refused_by_its_line(tmp_path, row, problem):
    path = tmp_path / "names.csv"
    path.write_text(f"label_id,label_name\n0,a\n{row}\n2,c\n")

    with pytest.raises(RecordError) as error:
        read_label_names(path, 3)

    assert str(error.value) == f"{path}, line 3: found {shown(row)}, {problem}.\n{WRITE_EACH}"


def test_a_field_that_no_csv_has_is_refused_by_its_line(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text(f"label_id,label_name\n0,{'a' * 200_000}\n")

    with pytest.raises(RecordError) as error:
        read_label_names(path, 1)

    assert str(error.value) == (
        f"{path}, line 2: field larger than field limit (131072).\nCorrect the quotes of that line."
    )


@pytest.mark.parametrize("row", ["1", "x,b", "-1,b", "3,b", "0,again"])
def test_a_row_that_is_no_class_of_its_own_is_named(tmp_path, row):
    path = tmp_path / "names.csv"
    path.write_text(f"label_id,label_name\n0,a\n{row}\n2,c\n")

    with pytest.raises(RecordError) as error:
        read_label_names(path, 3)

    assert str(error.value) == (
        f"{path}, line 3: found {row!r}, expected an index from 0 to 2 that no line above has, "
        f"and a name.\n{WRITE_EACH}"
    )


@pytest.mark.parametrize("content", ["", "label_id,label_name\n0,a\n2,c\n"])
def test_a_class_without_a_name_is_named(tmp_path, content):
    path = tmp_path / "names.csv"
    path.write_text(content)

    with pytest.raises(RecordError) as error:
        read_label_names(path, 3)

    found, missing = (2, 1) if content else (0, 0)
    assert str(error.value) == (
        f"{path} names {found} of 3 classes; class {missing} is missing.\n"
        "Name the file that belongs to these records, or correct num_classes."
    )


def test_a_csv_file_of_names_without_a_header_is_refused(tmp_path):
    path = tmp_path / "names.csv"
    path.write_text("0,x\n1,y\n")

    with pytest.raises(RecordError) as error:
        read_label_names(path, 2)

    assert str(error.value) == (
        f"{path}: the first line is '0,x', expected a header.\n"
        "Put a line above the classes that names the columns, such as index,name."
    )


def test_schemas_with_the_same_names_share_a_vocabulary(path):
    unnamed = read_schema(path)
    named = Schema.model_validate(unnamed.model_dump() | {"label_names": ("0", "1", "2")})
    other = Schema.model_validate(unnamed.model_dump() | {"label_names": ("0", "2", "1")})

    assert unnamed.vocabulary_sha256 == named.vocabulary_sha256
    assert unnamed.vocabulary_sha256 != other.vocabulary_sha256
    assert unnamed.interface == (("rgb", 4, "uint8"),)
    assert unnamed.widths == {"rgb": 4}
