"""Every shipped recipe: its size at the paper's scale, and all it does at a small one.

What a sweep misses it says nothing of, so the rows that the papers have are listed here too.
"""

import json
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import stir, tiny_frames, tiny_schema
from plain_session import NOTHING, REFUSED, plain_answers
from workspace_fixture import write_selection_of

from ensemble_kit.cli import main
from ensemble_kit.data.published import PUBLISHED
from ensemble_kit.export.stage import export_onnx
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.layers.frame_sampling import draw_table
from ensemble_kit.networks import blocks
from ensemble_kit.networks.catalogue import list_recipes, parts_of
from ensemble_kit.networks.loading import load_fused, load_member
from ensemble_kit.networks.parts import SEQUENCE_POOLINGS
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import load_recipe
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.store.provenance import CheckpointMetadata, FusedMetadata
from ensemble_kit.store.tensor_files import open_tensors, save_tensors
from ensemble_kit.training.loss import cross_entropy
from ensemble_kit.training.optimisation import clip_each

MODELS = Path(__file__).resolve().parents[2] / "models"
ON_DISK = sorted(
    path.relative_to(MODELS).with_suffix("").as_posix()
    for path in MODELS.glob("*/*.toml")
    if path.name != "ensembles.toml"
)
ROWS = {
    "attention": ["attention-enhanced", "attention-netvlad", "baseline-netvlad", "second-order"],
    "demo": ["average-moe", "gru", "netvlad", "soft-bof"],
    "dml": [
        "attention", "bi-gru-concat", "bi-gru-projection", "bi-gru-shared", "bi-lstm", "logistic",
        "lstm",
    ],
    "mfb": [
        f"{pooling}-{fusion}"
        for pooling in ("average", "dbof", "net-vlad")
        for fusion in ("audio", "concat", "fc-concat", "mfb", "rgb")
    ],
    "nextvlad": ["nextvlad"],
    "nonlocal": [
        "efnl-netvlad", "gru", "lfnl-netrvlad", "lfnl-netvlad", "netvlad", "soft-bof-4k",
        "soft-bof-8k",
    ],
    "willow": [
        "average-logistic", "average-moe-cg", "bow", "bow-8000", "gated-bow", "gated-gru",
        "gated-lstm", "gated-net-fv", "gated-net-rvlad", "gated-net-vlad", "gated-net-vlad-700k",
        "gru", "gru-late", "gru-random-frames", "lstm", "lstm-late", "lstm-random-frames",
        "net-fv", "net-fv-early", "net-rvlad", "net-vlad", "net-vlad-128-cg",
        "net-vlad-128-cg-cg", "net-vlad-128-glu", "net-vlad-128-glu-cg", "net-vlad-128-none",
        "net-vlad-early",
    ],
}  # fmt: skip

# Parameters of the authors' TensorFlow graphs for 3,862 classes, counted from their code. PyTorch's
# recurrent cells have a second bias: 3 H more a GRU layer, 4 H more an LSTM layer.
GRU_BIASES = 2 * 3 * 1200
LSTM_BIASES = 2 * 4 * 1024
PARAMETERS = {
    "attention/attention-enhanced": 174_700_460,
    "attention/attention-netvlad": 171_258_732,
    "attention/baseline-netvlad": 149_113_772,
    "dml/logistic": 4_452_886,
    "dml/lstm": 37_090_860 + LSTM_BIASES,
    "mfb/average-concat": 22_252_844,
    "mfb/average-fc-concat": 198_877_724,
    "mfb/average-mfb": 25_087_724,
    "nextvlad/nextvlad": 78_643_170,
    "nonlocal/gru": 63_466_124 + GRU_BIASES,
    "willow/average-logistic": 4_452_886,
    "willow/average-moe-cg": 37_175_612,
    "willow/bow": 28_772_140,
    "willow/bow-8000": 37_338_492,
    "willow/gated-bow": 37_168_940,
    "willow/gated-net-fv": 321_388_732,
    "willow/gated-net-rvlad": 321_249_852,
    "willow/gated-net-vlad": 321_528_380,
    "willow/gated-net-vlad-700k": 321_528_380,
    "willow/gru": 63_466_124 + GRU_BIASES,
    "willow/gru-random-frames": 63_466_124 + GRU_BIASES,
    "willow/lstm": 96_411_180 + LSTM_BIASES,
    "willow/lstm-random-frames": 96_411_180 + LSTM_BIASES,
    "willow/net-fv": 305_415_340,
    "willow/net-rvlad": 305_276_460,
    "willow/net-vlad": 305_554_988,
    "willow/net-vlad-128-cg-cg": 178_643_132,
    "willow/net-vlad-128-none": 162_669_740,
}
# S1's heads and fusions; the poolings before them come on top.
MFB_HEADS = {
    "dbof-concat": 77_247_724,
    "dbof-fc-concat": 213_117_724,
    "dbof-mfb": 39_327_724,
    "net-vlad-concat": 177_968_684,
    "net-vlad-fc-concat": 239_197_724,
    "net-vlad-mfb": 65_407_724,
}
# Numbers stored, with the statistics of batch norm: S5's table 1 has MiB of them in fp32.
VALUES = {
    "nonlocal/efnl-netvlad": 111_710_056,
    "nonlocal/gru": 63_466_124 + GRU_BIASES,
    "nonlocal/lfnl-netrvlad": 125_099_540,
    "nonlocal/lfnl-netvlad": 154_970_732,
    "nonlocal/soft-bof-4k": 28_572_796,
    "nonlocal/soft-bof-8k": 37_358_796,
}

TINY = {
    "num_clusters": (4, 3), "hidden_size": (4, 3), "num_heads": (2, 2), "reduced_size": (3, 2),
    "num_groups": (4, 2), "embedding_size": (5, 5), "gate_rank": (3, 3), "attention_size": (6, 6),
}  # fmt: skip
NUM_SAMPLED = 6
SCHEMA = tiny_schema(widths={"rgb": 8, "audio": 4}, num_classes=5)
RGB_ALONE = tiny_schema(widths={"rgb": 8}, num_classes=5)
STEPS = 8
REPEATS = 2


def stream_features(recipe):
    """Return what a recipe does with two modalities, in the graph."""
    is_sequence = recipe.pooling.name in SEQUENCE_POOLINGS
    fusion = recipe.fusion.name if recipe.fusion else "concat"
    return {("streams", recipe.pooling.modality_fusion, is_sequence), ("fusion", fusion)}


def part_features(recipe):
    """Return what of a recipe has its own form in the graph with one modality too."""
    sampling, pooling, hidden, head = recipe.sampling, recipe.pooling, recipe.hidden, recipe.head
    flags = ("state", "over_frames", "similarity", "encode_frames", "encode_clusters")
    return {
        ("sampling", sampling.name, pooling.name in SEQUENCE_POOLINGS),
        ("pooling", pooling.name, *(getattr(pooling, flag, None) for flag in flags)),
        ("non-local", getattr(pooling, "non_local", None) is not None),
        ("hidden", hidden and (hidden.gating, hidden.batch_norm)),
        ("head", head.name, head.probability_gating),
    }


def covering(names, features_of):
    """Return recipes that have every feature between them, the richest first."""
    features = {name: features_of(load_recipe(name)) for name in names}
    missing = set().union(*features.values())
    cheap_first = sorted(names, key=lambda name: load_recipe(name).pooling.name != "average")
    chosen = []
    while missing:
        best = max(cheap_first, key=lambda name: len(features[name] & missing))
        chosen.append(best)
        missing -= features[best]
    return chosen


def graphs():
    """Return groups of recipes to export as one graph each, and the schema of the group.

    Tracing takes a second for each stream of a member. So these are not all recipes, but every
    part and every form of it, and with one modality where a second would only repeat the first.
    ``pytest -m exhaustive`` exports them all.
    """
    paired = covering(ON_DISK, stream_features)
    names = covering([name for name in ON_DISK if load_recipe(name).fusion is None], part_features)
    half = len(names) // 2
    return [(paired, SCHEMA), (names[:half], RGB_ALONE), (names[half:], RGB_ALONE)]


GRAPHS = graphs()
NUM_MIXED = 12


@pytest.fixture(scope="module")
def entries():
    return {entry.recipe.name: entry for entry in list_recipes(PUBLISHED["youtube8m-2018"])}


def tiny(name):
    """Return a shipped recipe with every size made small, and its parts as they are."""
    recipe = load_recipe(name)
    sizes = {}
    for key, value in dict(recipe.pooling).items():
        if key in TINY:
            rgb, audio = TINY[key]
            both = f"{{rgb={rgb}, audio={audio}, other=1}}"
            sizes[f"pooling.{key}"] = both if isinstance(value, dict) else rgb
    if hasattr(recipe.sampling, "num_frames"):
        sizes["sampling.num_frames"] = NUM_SAMPLED
    if hasattr(recipe.fusion, "size"):
        sizes["fusion.size"] = 7
    if recipe.hidden is not None:
        sizes["hidden.size"] = 6
    return load_recipe(name, [f"{key}={value}" for key, value in sizes.items()])


def tiny_batch(rng, num_videos=16):
    lengths = torch.randint(2, 9, (num_videos,), generator=rng).tolist()
    labels = torch.rand(num_videos, SCHEMA.num_classes, generator=rng) < 0.4
    return *tiny_frames(SCHEMA, lengths, rng, length=8), labels.float()


def fit(model, frames, num_frames, labels):
    """Take a few steps on one batch as training does; return the first and the last loss."""
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = cross_entropy(model(frames, num_frames), labels)
        total = loss if model.penalty() is None else loss + model.penalty()
        optimiser.zero_grad()
        total.backward()
        clip_each([parameter.grad for parameter in model.parameters()], 1.0)
        optimiser.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def save(path, model, *, name):
    metadata = CheckpointMetadata(
        kit_version="0.0", name=name, run=name, recipe=model.recipe.metadata, step=STEPS,
        data_schema=model.schema, examples=16 * STEPS, seed=0, training_files=(),
    )  # fmt: skip
    save_tensors(path, model.state_dict(), metadata, force=False)
    return path


def test_the_sweep_sees_every_recipe_and_every_row_of_the_papers(entries):
    rows = [f"{folder}/{name}" for folder, names in ROWS.items() for name in names]

    assert len(ON_DISK) == 65
    assert list(entries) == ON_DISK == rows


def test_sizes_are_those_of_the_papers(entries):
    sizes = {name: entry.size for name, entry in entries.items()}

    assert {name: sizes[name].parameters for name in PARAMETERS} == PARAMETERS
    assert {name: sizes[name].values for name in VALUES} == VALUES


def test_the_sizes_of_bilinear_fusion_and_its_baselines_are_those_of_the_paper(entries):
    pooling = {
        "net-vlad": 2 * 8 * (1024 + 128) + 2 * 2 * 8 + 2 * 1152,  # assignments, centres, norms
        "dbof": 2000 * (1024 + 128) + 2 * 2 * 2000 + 2 * 1152,
    }

    for name, head in MFB_HEADS.items():
        before = next(size for prefix, size in pooling.items() if name.startswith(prefix))
        assert entries[f"mfb/{name}"].size.parameters == before + head, name


def test_sizes_are_the_files_that_the_paper_of_non_local_netvlad_weighs(entries):
    weighed = {name: entry for name, entry in entries.items() if name in VALUES}

    assert len(weighed) == 6
    for name, entry in weighed.items():
        mib = ceil(entry.size.values * 4 / 2**20)
        # one MiB less than the paper says of the largest: a wider block would be 592.2 MiB
        off = 1 if name == "nonlocal/lfnl-netvlad" else 0
        assert mib + off == entry.recipe.reported.checkpoint_mib, name


@pytest.mark.parametrize("name", ON_DISK)
def test_show_prints_every_size(name, entries, runner):
    shown = json.loads(runner.invoke(main, ["recipes", "show", name, "--json"]).stdout)

    assert (shown["parameters"], shown["values"]) == entries[name].size
    assert shown["bytes"]["bf16"] == 2 * shown["values"]


@pytest.mark.parametrize("name", ON_DISK)
def test_every_recipe_learns_and_its_checkpoint_is_what_it_was(name, tmp_path, rng):
    frames, num_frames, labels = tiny_batch(rng)
    torch.manual_seed(0)
    model = SubModel(tiny(name), SCHEMA)

    first, last = fit(model, frames, num_frames, labels)
    with open_tensors(save(tmp_path / "model.safetensors", model, name="tiny")) as file:
        loaded = load_member(file)

    assert last < 0.95 * first
    assert loaded.recipe == model.recipe
    draws = None
    if model.num_draws is not None:
        draws = draw_table("tiny", repeats=2, num_frames=model.num_draws)
    with torch.inference_mode():
        expected = model.eval()(frames, num_frames, draws)
        assert torch.equal(loaded.eval()(frames, num_frames, draws), expected)


def test_the_exported_recipes_have_every_part_between_them():
    recipes = [load_recipe(name) for names, _ in GRAPHS for name in names]

    exported = {part for recipe in recipes for part in parts_of(recipe)}
    assert exported == {part for name in ON_DISK for part in parts_of(load_recipe(name))}
    assert len(exported) >= 31


@pytest.fixture
def all_in_blocks(monkeypatch):
    """Have matrices of any size and content stored in blocks."""
    monkeypatch.setattr(blocks, "MIN_VALUES", 1)
    monkeypatch.setattr(blocks, "MAX_LOST_BLOCKS", 1.0)


# In int4, the graph with most steps; `-m exhaustive` exports the same parts in bf16 too.
@pytest.mark.parametrize(("names", "schema"), GRAPHS, ids=["two modalities", "rgb", "more rgb"])
def test_every_part_runs_alike_in_onnx_runtime_and_from_packed_numbers(
    names, schema, all_in_blocks, tmp_path, rng
):
    fused = fuse_random(names, schema, "int4", tmp_path)
    exported = export_onnx(fused, tmp_path / "ensemble.onnx", repeats=REPEATS)

    compare_with_onnx_runtime(fused, exported.path, rng)
    require_packed(fused, exported.proof)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("first", range(NUM_MIXED))
def test_every_recipe_runs_alike_in_onnx_runtime_among_others(
    first, dtype, all_in_blocks, tmp_path, rng
):
    # every 12th of the sorted names: five or six recipes, seldom two of one folder
    fused = fuse_random(ON_DISK[first::NUM_MIXED], SCHEMA, dtype, tmp_path)
    exported = export_onnx(fused, tmp_path / "ensemble.onnx", repeats=REPEATS)

    compare_with_onnx_runtime(fused, exported.path, rng)
    if dtype != "bf16":
        require_packed(fused, exported.proof)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ON_DISK)
def test_every_recipe_runs_alike_in_onnx_runtime_alone(name, tmp_path, rng):
    fused = fuse_random([name], SCHEMA, "bf16", tmp_path)
    exported = export_onnx(fused, tmp_path / "ensemble.onnx", repeats=REPEATS)

    compare_with_onnx_runtime(fused, exported.path, rng)


def require_packed(fused, proof):
    """Compute all matrices as they are stored, but those of recurrent cells."""
    with open_tensors(fused) as file:
        scaled = [name.removesuffix(SCALE) for name in file.specs if name.endswith(SCALE)]
        members = file.metadata_as(FusedMetadata).members
        packed = num_values = 0
        for member in members:
            with open_tensors(fused.parent / member.checkpoint.path) as checkpoint:
                counts = {key: spec.num_values for key, spec in checkpoint.specs.items()}
            matrices = {name.partition(".")[2] for name in scaled if member.name in name}
            packed += sum(counts[name] for name in matrices if ".cells." not in name)
            # two biases of a recurrent layer become one of ONNX's operator
            num_values += sum(count for key, count in counts.items() if ".cells.bias_hh" not in key)
        assert len(scaled) >= len(members)
    shares = proof.shares
    assert shares.converted_in_every_run == 0
    assert shares.as_stored == packed > 0
    assert shares.as_stored + shares.converted_once >= num_values
    assert proof.exact_difference <= 1e-5
    assert 0 < proof.shipped_difference < 0.05


def fuse_random(names, schema, dtype, tmp_path):
    """Fuse recipes with random weights, each made tiny."""
    checkpoints = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        member = name.replace("/", "-")
        model = stir(SubModel(tiny(name), schema)).eval()
        checkpoints[member] = save(tmp_path / f"{member}.safetensors", model, name=member)
    share = 1 / len(names)
    selection = write_selection_of(
        tmp_path / "selection.json", checkpoints, dict.fromkeys(checkpoints, share)
    )
    return fuse(selection, tmp_path / "fused.safetensors", dtype=dtype).path


def compare_with_onnx_runtime(fused, exported, rng):
    """Run a fused file and what was exported from it on many shapes, both in float32."""
    session = OnnxEnsemble(exported, is_exact=True)
    with open_tensors(fused) as file:
        ensemble = load_fused(file, repeats=REPEATS)
    share = max(ensemble.coefficients)
    # one frame, no frame, more frames than were traced, and batches of one and many
    for lengths, padded in ([1], 1), ([5], 5), ([2, 0, 9], 9), ([1, 40, 17, 3, 8], 40):
        frames, num_frames = tiny_frames(ensemble.schema, lengths, rng, length=padded)
        with torch.inference_mode():
            expected = ensemble(frames, num_frames).numpy()
        arrays = {modality: values.numpy() for modality, values in frames.items()}
        ours = session.run(arrays, num_frames.numpy()).probabilities
        # a member's own difference of 1e-5 is its share of the mixture's
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * share)
    assert plain_answers(exported, NOTHING) == [REFUSED] * len(NOTHING)
