"""Selection files are refused where fused files would refuse what they say."""

import json

import pytest
from candidate_files import (
    right_for,
    write_own,
)

from ensemble_kit.errors import SelectionError
from ensemble_kit.selection.stage import select
from ensemble_kit.store.selection_file import read_selection


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": -1}, "k is -1: Input should be greater than or equal to 1"),
        ({"k": 10**9}, "k is 1000000000: Input should be less than or equal to 1000000"),
        ({"videos": -5}, "videos is -5: Input should be greater than or equal to 0"),
        (  # a fused file keeps room for 64 digits
            {"dataset_sha256": "0x" + "f" * 70},
            f"dataset_sha256 is '0x{'f' * 70}': String should match pattern '^[0-9a-f]{{64}}$'",
        ),
        ({"videos": 2**60}, f"videos is {2**60}: Input should be less than or equal to {2**53}"),
    ],
)
def test_values_that_no_fused_file_may_hold_are_refused(change, problem, selection, tmp_path):
    values = json.loads(selection.read_bytes())
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(values | change))

    with pytest.raises(SelectionError) as caught:
        read_selection(path)

    assert str(caught.value) == (
        f"{path} is not a selection: {problem}.\nMake it again with `ensemble-kit select`."
    )


def test_a_member_that_is_there_twice_is_refused(selection, tmp_path):
    values = json.loads(selection.read_bytes())
    name = values["members"][0]["name"]
    values["members"] = [values["members"][0]] * 2
    path = tmp_path / "selection.json"
    path.write_text(json.dumps(values))

    with pytest.raises(SelectionError) as caught:
        read_selection(path)

    assert str(caught.value) == (
        f"{path} is not a selection: two members share a name: {name}, {name}.\n"
        "Make it again with `ensemble-kit select`."
    )


def test_a_missing_selection_is_named(tmp_path):
    path = tmp_path / "selection.json"

    with pytest.raises(SelectionError) as caught:
        read_selection(path)

    assert str(caught.value) == (
        f"{path} cannot be read: No such file or directory.\n"
        "Run `ensemble-kit select` first, or name a selection that exists."
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"k": "20"}, ": k is '20': Input should be a valid integer"),
        ({"weights": []}, ": weights is not a key of a selection"),
        (
            {"members": []},
            ": members is []: Tuple should have at least 1 item after validation, not 0",
        ),
    ],
)
def test_a_selection_of_another_form_is_refused(tmp_path, change, problem):
    path = tmp_path / "s.json"
    select([write_own(tmp_path / "p", right_for("a"))], output=path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    with pytest.raises(SelectionError) as caught:
        read_selection(path)

    assert str(caught.value) == (
        f"{path} is not a selection{problem}.\nMake it again with `ensemble-kit select`."
    )


def test_what_is_not_json_is_no_selection(tmp_path):
    path = tmp_path / "s.json"
    path.write_text("members")

    with pytest.raises(SelectionError) as caught:
        read_selection(path)

    assert str(caught.value) == (
        f"{path} is not a selection: Invalid JSON: expected value at line 1 column 1.\n"
        "Make it again with `ensemble-kit select`."
    )
