from types import SimpleNamespace

import pytest
import torch
from builders import tiny_frames, tiny_model, tiny_recipe, tiny_schema

from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks.ensemble import FusedEnsemble, example_frames, longest_proof

SCHEMA = tiny_schema(value_type="uint8")
LENGTHS = [7, 4, 1]


@pytest.fixture
def members():
    return {
        "clusters": tiny_model(tiny_recipe(pooling="netvlad"), SCHEMA, seed=1),
        "bag": tiny_model(tiny_recipe(pooling="soft_bof", modality_fusion="early"), SCHEMA, seed=2),
        "gru": tiny_model(tiny_recipe(pooling="gru"), SCHEMA, seed=3),
    }


def fuse(members, coefficients=(0.5, 0.3, 0.2), repeats=3):
    return FusedEnsemble(members, coefficients, SCHEMA, repeats=repeats).eval()


def test_probabilities_are_the_members_mixed_by_the_coefficients(members, rng):
    frames, num_frames = tiny_frames(SCHEMA, LENGTHS, rng)

    mixed = fuse(members)(frames, num_frames)

    shares = [
        coefficient
        * members[name](
            frames,
            num_frames,
            None if name == "gru" else draw_table(name, repeats=3, num_frames=8),
        )
        for name, coefficient in [("clusters", 0.5), ("bag", 0.3), ("gru", 0.2)]
    ]
    torch.testing.assert_close(mixed, sum(shares))


def test_the_same_input_gives_the_same_output_alone_or_in_any_batch(members, rng):
    ensemble = fuse(members)
    frames, num_frames = tiny_frames(SCHEMA, LENGTHS, rng, length=9)

    together = ensemble(frames, num_frames)

    assert torch.equal(ensemble(frames, num_frames), together)
    for video, length in enumerate(LENGTHS):
        alone = {name: values[video : video + 1, :length] for name, values in frames.items()}
        torch.testing.assert_close(
            ensemble(alone, num_frames[video : video + 1]), together[video : video + 1]
        )


def test_members_of_one_recipe_draw_differently(members, rng):
    twins = {"one": members["clusters"], "two": members["clusters"]}
    frames, num_frames = tiny_frames(SCHEMA, [7], rng)

    first = fuse(twins, (1.0, 0.0), repeats=1)(frames, num_frames)
    second = fuse(twins, (0.0, 1.0), repeats=1)(frames, num_frames)

    assert not torch.allclose(first, second)


def test_more_repeats_change_what_is_drawn_and_nothing_else(members, rng):
    frames, num_frames = tiny_frames(SCHEMA, LENGTHS, rng)
    recurrent = {"gru": members["gru"]}

    assert torch.equal(
        fuse(recurrent, (1.0,), repeats=5)(frames, num_frames),
        fuse(recurrent, (1.0,), repeats=1)(frames, num_frames),
    )
    assert not torch.equal(
        fuse(members, repeats=5)(frames, num_frames), fuse(members, repeats=1)(frames, num_frames)
    )


def test_the_tables_of_draws_are_not_stored_with_the_weights(members):
    ensemble = fuse(members)

    assert not [name for name in ensemble.state_dict() if not name.startswith("member_")]
    assert {name for name, _ in ensemble.named_buffers() if "draws" in name} == {
        "draws_clusters",
        "draws_bag",
    }


@pytest.mark.parametrize("value_type", ["uint8", "float32"])
def test_example_frames_fit_the_schema_and_are_the_same_on_every_call(value_type):
    schema = tiny_schema(value_type=value_type)

    frames, num_frames = example_frames(schema, 3, 6)
    again, _ = example_frames(schema, 3, 6)

    assert {name: tuple(values.shape) for name, values in frames.items()} == {
        "rgb": (3, 6, 5),
        "audio": (3, 6, 3),
    }
    assert frames["rgb"].dtype == getattr(torch, value_type)
    assert torch.equal(frames["rgb"], again["rgb"])
    assert (num_frames >= 1).all()
    assert (num_frames <= 6).all()


def test_an_ensemble_is_proved_on_videos_as_long_as_all_its_members_take():
    schema = tiny_schema()

    def proved(limit):
        mapping = SimpleNamespace(max_frames=limit) if limit else None
        return SimpleNamespace(mapping=mapping)

    assert longest_proof(schema, [proved(None)]) == schema.max_frames == 300
    assert longest_proof(schema, [proved(64), proved(None), proved(90)]) == 64
    long = schema.model_copy(update={"max_frames": 1_000_000})
    assert longest_proof(long, [proved(None)]) == 3_000
    vectors = schema.model_copy(update={"level": "video"})
    assert longest_proof(vectors, [proved(None)]) == 1
