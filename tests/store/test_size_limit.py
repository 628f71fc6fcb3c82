from types import SimpleNamespace

import pytest

from ensemble_kit.errors import SizeLimitError
from ensemble_kit.store.selection_file import FrontierMetadata
from ensemble_kit.store.size_limit import best_that_fits, refuse_size

SHARED = 5
SIZES = {"a": (100, 50), "b": (60, 30), "c": (80, 40)}  # bytes in bf16 and in int8
WITHOUT = {"a": 0.3, "b": 0.55, "c": 0.4}  # GAP without each member
FRONTIER = {"b": 0.3, "c": 0.4, "ab": 0.5, "abc": 0.6}


def selection_of(members="abc", *, are_sizes_known=True, has_several=False):
    """Return what of a selection is read, with members by their letters."""
    return SimpleNamespace(
        metric_name="GAP@20",
        score=0.6,
        shared_bytes=SHARED,
        label=lambda name, dtype: f"{name} ({dtype})" if has_several else name,
        members=[
            SimpleNamespace(
                name=name,
                score_without=WITHOUT[name],
                model=SimpleNamespace(
                    bytes_by_dtype=dict(
                        zip(("fp32", "fp16", "bf16", "int8", "int4"),
                            (2 * bf16, bf16, bf16, int8, int8 - 10), strict=True)
                    )
                    if are_sizes_known
                    else None
                ),
            )
            for name, (bf16, int8) in SIZES.items()
            if name in members
        ],
        frontier=[
            FrontierMetadata(
                members=tuple(letters),
                dtypes=("bf16",) * len(letters),
                score=score,
                confirmed_score=None,
                bytes=SHARED + sum(SIZES[name][0] for name in set(letters)),
            )
            for letters, score in FRONTIER.items()
        ],
    )  # fmt: skip


def refused(num_bytes, max_size, *, selection=None, members="abc", **options):
    """Refuse a file of some members in bf16; return the message."""
    with pytest.raises(SizeLimitError) as caught:
        refuse_size(
            "fused",
            num_bytes,
            max_size,
            members=[SimpleNamespace(name=name, dtype="bf16") for name in members],
            selection=selection,
            **options,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("room", "expected"),
    [(64, None), (65, ("b", 65)), (164, ("c", 85)), (165, ("ab", 165)), (1000, ("abc", 245))],
)
def test_the_best_ensemble_that_fits_is_found(room, expected):
    found = best_that_fits(selection_of(), room)

    assert (found and ("".join(found.members), found.bytes)) == expected


def test_the_limit_itself_fits_and_one_byte_more_does_not():
    refuse_size("fused", 240, 240, members=(), selection=None)

    with pytest.raises(SizeLimitError):
        refuse_size("fused", 241, 240, members=(), selection=None)


def test_the_message_names_the_member_least_missed_and_the_precision_that_fits():
    message = refused(255, 195, selection=selection_of(), overhead=10)

    assert message == (
        "The fused file has 255 bytes (255 bytes), 60 bytes (60 bytes) over the limit of 195 "
        "bytes. Without b it would fit and lose the least: GAP@20 0.5500, 0.0500 less. In int8 all "
        "would fit, in 125 bytes. Of what selection measured, a + b would fit and score best: "
        "GAP@20 0.5000 in 165 bytes.\n"
        "Fuse with --dtype int8, select again with --max-size 185, or raise --max-size here."
    )


def test_a_member_that_is_missed_more_is_named_where_the_other_is_too_small():
    message = refused(245, 184, selection=selection_of())

    assert " Without c it would fit and lose the least: GAP@20 0.4000, 0.2000 less." in message


def test_the_message_says_where_no_member_and_no_precision_would_do():
    message = refused(2245, 1030, selection=selection_of(), overhead=1000)

    assert message == (
        "The fused file has 2,245 bytes (2.2 KiB), 1,215 bytes (1.2 KiB) over the limit of 1.0 "
        "KiB. Without b it would lose the least (GAP@20 0.5500, 0.0500 less), but not fit.\n"
        "Train smaller members, or raise --max-size here."
    )


def test_a_single_member_is_not_to_be_left_out():
    message = refused(105, 60, selection=selection_of("a"), members="a")

    assert message == (
        "The fused file has 105 bytes (105 bytes), 45 bytes (45 bytes) over the limit of 60 bytes. "
        "In int8 all would fit, in 55 bytes.\n"
        "Fuse with --dtype int8, or raise --max-size here."
    )


def test_precisions_are_named_where_selection_chose_among_them():
    message = refused(245, 170, selection=selection_of(has_several=True))

    assert " a (bf16) + b (bf16) would fit and score best: " in message


def test_sizes_that_are_not_known_are_not_guessed():
    message = refused(245, 200, selection=selection_of(are_sizes_known=False))

    assert " but not fit. Of what selection measured, a + b " in message


def test_without_the_selection_the_message_says_to_select_again():
    assert refused(250, 170) == (
        "The fused file has 250 bytes (250 bytes), 80 bytes (80 bytes) over the limit of 170 "
        "bytes.\nSelect and fuse again with a smaller --max-size, or raise --max-size here."
    )
