from types import SimpleNamespace

import pytest

from ensemble_kit.errors import SizeLimitError
from ensemble_kit.store.selection_file import FrontierMetadata
from ensemble_kit.store.size_limit import best_that_fits, refuse_size

SIZES = {"a": (100, 50), "b": (60, 30), "c": (80, None)}  # bytes in bf16 and in int8


def selection_of(frontier, dtype="bf16"):
    """Return what of a selection is read: ``frontier`` is GAPs by the members' letters."""
    return SimpleNamespace(
        k=20,
        dtype=dtype,
        candidates=[
            SimpleNamespace(
                name=name, bytes_by_dtype=None if int8 is None else {"bf16": bf16, "int8": int8}
            )
            for name, (bf16, int8) in SIZES.items()
        ],
        frontier=[
            FrontierMetadata(
                members=tuple(letters),
                gap=gap,
                confirmed_gap=None,
                bytes=sum(SIZES[name][0] for name in set(letters)),
            )
            for letters, gap in frontier.items()
        ],
    )


FRONTIER = {"b": 0.3, "c": 0.4, "ab": 0.5, "abc": 0.6}


def refused(num_bytes, max_size, **options):
    with pytest.raises(SizeLimitError) as caught:
        refuse_size("fused", num_bytes, max_size, **{"dtype": "bf16", **options})
    return str(caught.value)


@pytest.mark.parametrize(
    ("room", "dtype", "expected"),
    [
        (59, "bf16", None),
        (60, "bf16", ("b", 60)),
        (159, "bf16", ("c", 80)),
        (160, "bf16", ("ab", 160)),
        (1000, "bf16", ("abc", 240)),
        (1000, "int8", ("ab", 80)),  # what c takes in int8 is not known
        (79, "int8", ("b", 30)),
    ],
)
def test_the_best_ensemble_that_fits_is_found_in_any_type(room, dtype, expected):
    found = best_that_fits(selection_of(FRONTIER), dtype, room)

    assert (found and ("".join(found.members), found.bytes)) == expected


def test_what_was_added_twice_is_counted_once():
    found = best_that_fits(selection_of({"aba": 0.5}), "int8", 80)

    assert found.bytes == 80


def test_the_limit_itself_fits_and_one_byte_more_does_not():
    refuse_size("fused", 240, 240, selection=None, dtype="bf16")

    with pytest.raises(SizeLimitError):
        refuse_size("fused", 241, 240, selection=None, dtype="bf16")


def test_the_message_names_what_would_fit_and_leaves_room_for_the_rest():
    message = refused(250, 170, selection=selection_of(FRONTIER), overhead=10)

    assert message == (
        "The fused file has 250 bytes (250 bytes), 80 bytes (80 bytes) over the limit of 170 "
        "bytes. Of what selection measured, a + b would fit and score best: GAP@20 0.5000 in 160 "
        "bytes.\n"
        "Select and fuse again with --dtype bf16 --max-size 160, or raise --max-size here."
    )


def test_the_message_says_that_nothing_would_fit():
    message = refused(2000, 1030, selection=selection_of(FRONTIER), overhead=1000)

    assert message == (
        "The fused file has 2,000 bytes (2.0 KiB), 970 bytes (970 bytes) over the limit of 1.0 "
        "KiB. Nothing that selection measured would fit in bf16.\n"
        "Train smaller members, fuse in a smaller --dtype, or raise --max-size here."
    )


def test_without_the_selection_the_message_says_to_select_again():
    assert refused(250, 170, selection=None) == (
        "The fused file has 250 bytes (250 bytes), 80 bytes (80 bytes) over the limit of 170 "
        "bytes.\nSelect and fuse again with a smaller --max-size, or raise --max-size here."
    )
