import copy
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from builders import tiny_recipe, tiny_schema, write_checkpoint
from workspace_fixture import COEFFICIENTS, MEMBERS, REPEATS, write_selection_of

import ensemble_kit
from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import CheckpointError, ExportError, OutputError, SizeLimitError
from ensemble_kit.export import export_onnx, parity
from ensemble_kit.export import stage as export
from ensemble_kit.files import format_size, sha256_of
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.layers.frame_preparation import PreparedFrames, prepare_frames
from ensemble_kit.layers.frame_sampling import AllFrames, draw_table
from ensemble_kit.networks.ensemble import FusedEnsemble, example_frames
from ensemble_kit.networks.loading import load_fused
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.metadata import proof_property
from ensemble_kit.serving.onnx_file import _property, read_tensors
from ensemble_kit.store.blocks import SCALE
from ensemble_kit.store.provenance import FusedMetadata, OnnxMetadata
from ensemble_kit.store.selection_file import FrontierMetadata, read_selection
from ensemble_kit.store.tensor_files import open_tensors

ORDER = 1e-6  # float32 sums in another order: some eps of a probability
REPORT_IT = "Report this as a bug in ensemble-kit; nothing was written."
SCHEMAS = {  # one, three and two modalities; bytes and numbers; frames and video means
    "average": tiny_schema(widths={"features": 5}).model_copy(update={"level": "video"}),
    "soft_bof": tiny_schema(widths={"rgb": 5, "audio": 3, "text": 4}, value_type="uint8"),
    "netvlad": tiny_schema(value_type="uint8"),
    "gru": tiny_schema(widths={"rgb": 5, "audio": 3}),
    "lstm": tiny_schema(widths={"rgb": 5, "audio": 3}),
    "bigru": tiny_schema(widths={"audio": 4}, value_type="uint8"),
    "bilstm": tiny_schema(widths={"rgb": 5, "audio": 3}),
    "attention_bigru": tiny_schema(widths={"audio": 4}),
    "attention_netvlad": tiny_schema(widths={"audio": 4}),
}
DTYPES = {"average": "fp32", "soft_bof": "fp16", "netvlad": "bf16", "gru": "bf16"}  # else fp32
FUSIONS = {"soft_bof": "early", "gru": "early", "lstm": "early"}  # else late
SAMPLINGS = {"bilstm": "random", "attention_bigru": "random_sequence"}  # else the usual one


class Case(NamedTuple):
    """A fused file in PyTorch and in ONNX Runtime."""

    path: Path
    ensemble: FusedEnsemble
    session: OnnxEnsemble
    schema: Schema

    def torch(self, frames, num_frames):
        with torch.inference_mode():
            return self.ensemble(frames, num_frames).numpy()

    def onnx(self, frames, num_frames):
        return self.session.run({k: v.numpy() for k, v in frames.items()}, num_frames.numpy())


@pytest.fixture(scope="module", params=[*SCHEMAS, "all four"])
def case(request, tmp_path_factory, exported, ensemble):
    """Poolings alone, those that read sequences among them, and four together."""
    if request.param == "all four":
        return Case(exported.path, ensemble, OnnxEnsemble(exported.path), ensemble.schema)
    pooling = request.param
    folder = tmp_path_factory.mktemp(pooling)
    recipe = tiny_recipe(
        pooling=pooling,
        modality_fusion=FUSIONS.get(pooling, "late"),
        sampling=SAMPLINGS.get(pooling),
    )
    write_checkpoint(folder / "member.safetensors", recipe, SCHEMAS[pooling], seed=3)
    selection = write_selection_of(
        folder / "selection.json", {"one": folder / "member.safetensors"}, {"one": 1.0}
    )
    fused = fuse(selection, folder / "fused.safetensors", dtype=DTYPES.get(pooling, "fp32")).path
    path = export_onnx(fused, folder / "ensemble.onnx", repeats=REPEATS).path
    with open_tensors(fused) as file:
        loaded = load_fused(file, repeats=REPEATS)
    return Case(path, loaded, OnnxEnsemble(path), SCHEMAS[pooling])


@pytest.fixture
def graph(built, monkeypatch):
    """Make every export take one graph, which saves the tracing; a test may damage its copy."""
    model = onnx.ModelProto()
    model.CopyFrom(built.model)
    copied = built._replace(model=model)
    monkeypatch.setattr(export, "build_graph", lambda *_, **__: copied)
    return model.graph


def refused(kind, fused, output, **options):
    """Export, which must fail and leave nothing; return the message."""
    with pytest.raises(kind) as caught:
        export_onnx(fused, output, repeats=REPEATS, **options)
    assert not output.exists()
    assert not list(output.parent.glob(".*"))
    return str(caught.value)


# What the file computes


@pytest.mark.parametrize(("batch_size", "length"), [(1, 1), (2, 3), (5, 11), (3, 300)])
def test_onnx_runtime_computes_what_pytorch_does(case, batch_size, length):
    frames, num_frames = example_frames(case.schema, batch_size, length)

    found = case.onnx(frames, num_frames)

    expected = case.torch(frames, num_frames)
    assert found.probabilities.shape == (batch_size, case.schema.num_classes)
    np.testing.assert_allclose(found.probabilities, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected) > 1e-3


def test_labels_and_confidences_are_the_best_classes_in_order(case):
    probabilities, labels, confidences = case.onnx(*example_frames(case.schema, 5, 6))

    assert labels.shape == confidences.shape == (5, case.schema.num_classes)
    assert (labels.dtype, confidences.dtype) == (np.int64, np.float32)
    np.testing.assert_array_equal(confidences, -np.sort(-probabilities, axis=1))
    np.testing.assert_array_equal(np.take_along_axis(probabilities, labels, 1), confidences)


def test_the_same_input_gives_the_same_bits(case):
    frames, num_frames = example_frames(case.schema, 4, 8)

    first, second = (case.onnx(frames, num_frames) for _ in range(2))
    reopened = OnnxEnsemble(case.path).run(
        {k: v.numpy() for k, v in frames.items()}, num_frames.numpy()
    )

    for one, two, three in zip(first, second, reopened, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_a_video_is_tagged_alike_alone_in_any_batch_and_at_any_place(case):
    frames, _ = example_frames(case.schema, 5, 9)
    num_frames = torch.tensor([9, 1, 4, 2, 7])
    together = case.onnx(frames, num_frames).probabilities
    order = torch.tensor([3, 0, 4, 2, 1])

    mixed = case.onnx({k: v[order] for k, v in frames.items()}, num_frames[order]).probabilities

    np.testing.assert_allclose(mixed, together[order], rtol=0, atol=ORDER)
    for video, length in enumerate(num_frames):
        alone = {k: v[video : video + 1, :length] for k, v in frames.items()}
        found = case.onnx(alone, num_frames[video : video + 1]).probabilities
        np.testing.assert_allclose(found[0], together[video], rtol=0, atol=ORDER)


def test_what_lies_beyond_a_videos_frames_never_matters(case):
    frames, _ = example_frames(case.schema, 3, 7)
    num_frames = torch.tensor([2, 7, 5])
    spoilt = {name: values.clone() for name, values in frames.items()}
    for name, values in frames.items():
        for video, length in enumerate(num_frames):
            values[video, length:] = 0
            spoilt[name][video, length:] = 255 if values.dtype == torch.uint8 else torch.nan

    np.testing.assert_array_equal(
        case.onnx(spoilt, num_frames).probabilities, case.onnx(frames, num_frames).probabilities
    )


def test_a_video_of_no_frames_has_finite_probabilities_those_of_pytorch(case):
    frames, _ = example_frames(case.schema, 3, 4)
    num_frames = torch.tensor([0, 4, 0])

    found = case.onnx(frames, num_frames).probabilities

    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[0], found[2])
    np.testing.assert_allclose(found, case.torch(frames, num_frames), rtol=0, atol=1e-5)


def test_repeats_are_the_mean_of_single_runs_with_the_rows_of_the_tables(ensemble):
    members = copy.deepcopy(ensemble).double()
    frames, num_frames = example_frames(ensemble.schema, 4, 9)

    with torch.inference_mode():
        together = members(frames, num_frames)
        prepared = prepare_frames(frames, num_frames)
        expected = torch.zeros(4, 6, dtype=torch.float64)
        for name, coefficient in COEFFICIENTS.items():
            member = getattr(members, f"member_{name}")
            table = draw_table(name, repeats=REPEATS, num_frames=8)
            singles = [member.classify(prepared, row.unsqueeze(0)) for row in table]
            expected += coefficient * sum(singles) / REPEATS

    torch.testing.assert_close(together, expected)
    is_random = [not torch.equal(*pair) for pair in pairwise(singles)]
    assert not any(is_random)  # the last member, the recurrent one, draws nothing


def test_the_file_averages_as_many_repeats_as_it_was_exported_with(ensemble, exported):
    frames, num_frames = example_frames(ensemble.schema, 4, 9)
    session = OnnxEnsemble(exported.path)
    found = session.run({k: v.numpy() for k, v in frames.items()}, num_frames.numpy())

    with torch.inference_mode():
        prepared = prepare_frames(frames, num_frames)
        expected = torch.zeros(4, 6)
        for name, coefficient in COEFFICIENTS.items():
            member = getattr(ensemble, f"member_{name}")
            for row in draw_table(name, repeats=REPEATS, num_frames=8):
                share = coefficient / REPEATS
                expected += share * member.classify(prepared, row.unsqueeze(0))

    np.testing.assert_allclose(found.probabilities, expected.numpy(), rtol=0, atol=1e-5)


def tiled(member, prepared, draws):
    """Run a member as S5 did: its input R times along the batch, drawn frames copied; the mean."""
    batch_size = len(prepared.is_frame)
    copies = PreparedFrames(*(part.repeat_interleave(REPEATS, dim=0) for part in prepared[:3]), {})
    if draws is None:
        return member.classify(copies).unflatten(0, (batch_size, REPEATS)).mean(dim=1)
    rows = draws.repeat(batch_size, 1).unsqueeze(1)  # a draw for each copy
    indices = member.sampling.indices(copies.is_frame, rows)[:, 0].unsqueeze(-1)
    drawn = [part.gather(1, indices.expand(-1, -1, part.shape[-1])) for part in copies[:2]]
    gathered = PreparedFrames(*drawn, copies.is_frame[:, :1].expand(-1, indices.shape[1]), {})
    as_they_are = copy.deepcopy(member)
    as_they_are.sampling = AllFrames()
    return as_they_are.classify(gathered).unflatten(0, (batch_size, REPEATS)).mean(dim=1)


def test_the_file_computes_what_tiling_its_input_would_with_the_same_draws(case):
    frames, num_frames = example_frames(case.schema, 5, 13)
    with torch.inference_mode():
        prepared = prepare_frames(frames, num_frames)
        expected = sum(
            share * tiled(case.ensemble.member(name), prepared, draws_of(case.ensemble, name))
            for name, share in zip(case.ensemble.names, case.ensemble.coefficients, strict=True)
        )

    found = case.onnx(frames, num_frames).probabilities

    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5)


def draws_of(ensemble, name):
    return ensemble.member(name).draws_for(name, repeats=REPEATS)


# What the file holds


def weights_of(path):
    graph = onnx.load(path).graph
    return graph, {t.name: t for t in graph.initializer if t.name.startswith("member_")}


def test_every_weight_is_stored_once_in_the_fused_type_with_a_cast_after_it(exported, fused):
    graph, weights = weights_of(exported.path)
    with open_tensors(fused["bf16"].path) as file:
        stored = {name: tensor.view(torch.int16) for name, tensor in file.tensors()}

    readers = {name: [] for name in weights}
    for node in graph.node:
        for name in readers.keys() & set(node.input):
            readers[name].append((node.op_type, [a.i for a in node.attribute]))
    cells = {name for name in stored if ".cells." in name}
    arranged = {name for name in weights if ".onnx." in name}
    assert weights.keys() - arranged == stored.keys() - cells
    assert (len(weights) > 40, len(cells), len(arranged)) == (True, 16, 12)  # two biases are one
    for name, tensor in weights.items():
        assert tensor.data_type == onnx.TensorProto.BFLOAT16, name
        assert readers[name] == [("Cast", [onnx.TensorProto.FLOAT])], name
        if name not in arranged:
            assert tensor.raw_data == stored[name].numpy().tobytes(), name
    held = b"".join(weights[name].raw_data for name in arranged)
    given = torch.cat([stored[name].flatten() for name in cells]).numpy()
    np.testing.assert_array_equal(np.sort(np.frombuffer(held, np.int16)), np.sort(given))


@pytest.mark.parametrize(("dtype", "packed"), [("int8", "I8"), ("int4", "U8")])
def test_blocks_stay_blocks_with_their_scales_in_a_recurrent_stack_too(dtype, packed, tmp_path):
    sizes = ["pooling.hidden_size=40", "hidden.size=80"]  # enough numbers for blocks
    recipe = tiny_recipe(pooling="bigru", overrides=sizes)
    write_checkpoint(tmp_path / "one.safetensors", recipe, tiny_schema(), seed=4)
    selection = write_selection_of(
        tmp_path / "selection.json", {"one": tmp_path / "one.safetensors"}, {"one": 1.0}
    )
    fused = fuse(selection, tmp_path / "fused.safetensors", dtype=dtype).path

    exported = export_onnx(fused, tmp_path / "e.onnx")

    assert exported.proof.exact_difference <= 1e-5
    types = {tensor.name: tensor.type_name for tensor in read_tensors(exported.path)}
    with open_tensors(fused) as file:
        whole = {name for name, spec in file.specs.items() if spec.dtype == packed}
    assert {name for name, kind in types.items() if kind == dtype.upper()} == {
        name.replace(".cells.", ".onnx.") for name in whole
    }
    assert sum(".cells." in name for name in whole) == 12
    for name in whole:
        assert types[name.replace(".cells.", ".onnx.") + SCALE] == "FLOAT16"
    assert {kind for name, kind in types.items() if name.startswith("member_")} == {
        dtype.upper(), "FLOAT16", "BFLOAT16"
    }  # fmt: skip


def test_nodes_are_called_by_member_part_and_operator(exported):
    graph = onnx.load(exported.path).graph

    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names) > 100
    weights = tuple(tensor.name for tensor in graph.initializer)
    first = {name.split("/")[0] for name in names if not name.startswith(weights)}
    assert first == {*MEMBERS, "frames", "mixture", "no_videos_or_no_frames"}
    assert {
        "rnn/pooling.rgb/GRU", "rnn/pooling.rgb/GRU_2", "vlad/pooling.audio/Softmax",
        "vlad/gating/Sigmoid", "bag/head/Softmax", "mixture/TopK", "frames/Cast",
        "member_rnn.hidden.weight/Cast",
    } <= set(names)  # fmt: skip


def test_nothing_floating_beside_weights_and_draws_is_larger_than_one_number(exported):
    graph, weights = weights_of(exported.path)

    others = {t.name: tuple(t.dims) for t in graph.initializer if t.name not in weights}
    floating = {
        t.name for t in graph.initializer if t.data_type in {onnx.TensorProto.FLOAT, 10, 16}
    }
    large = {name: dims for name, dims in others.items() if name in floating and dims}
    assert large == {"draws_bag": (REPEATS, 8), "draws_vlad": (REPEATS, 8)}
    for name in ("bag", "vlad"):
        (table,) = [t for t in graph.initializer if t.name == f"draws_{name}"]
        expected = draw_table(name, repeats=REPEATS, num_frames=8).numpy()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(table), expected)


def test_the_file_is_hardly_larger_than_the_fused_one(exported, fused):
    allowed = fused["bf16"].num_bytes * 1.05 + 200_000

    assert exported.num_bytes == exported.path.stat().st_size <= allowed
    assert fused["fp32"].num_bytes > allowed  # so a copy of the weights would have been seen
    assert list(exported.path.parent.glob(f"{exported.path.name}*")) == [
        exported.path
    ]  # no external data


def test_the_interface_is_the_schemas_with_free_batch_and_length(case):
    graph = onnx.load(case.path).graph

    def describe(values):
        return {
            value.name: (
                onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type),
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    types = {"uint8": "UINT8", "float32": "FLOAT"}
    count = case.schema.num_classes
    assert describe(graph.input) == {
        m.name: (types[m.value_type], ["batch", "frames", m.width]) for m in case.schema.modalities
    } | {"num_frames": ("INT64", ["batch"])}
    assert describe(graph.output) == {
        "probabilities": ("FLOAT", ["batch", count]),
        "labels": ("INT64", ["batch", count]),
        "confidences": ("FLOAT", ["batch", count]),
    }


def test_the_metadata_says_what_the_file_is_and_where_it_comes_from(exported, fused, workspace):
    metadata = OnnxEnsemble(exported.path).metadata

    assert metadata.keys() == {
        *OnnxMetadata.model_fields, "content_sha256"
    }  # fmt: skip
    with open_tensors(fused["bf16"].path) as file:
        parent = file.metadata_as(FusedMetadata)
    assert metadata["kit_version"] == ensemble_kit.__version__
    assert Schema.model_validate_json(metadata["data_schema"]) == parent.data_schema
    assert json.loads(metadata["label_names"]) == [
        "steady 0", "burst 1", "order 2", "steady 3", "burst 4", "order 5"
    ]  # fmt: skip
    assert (metadata["repeats"], metadata["top_k"], metadata["opset"]) == ("3", "6", "20")
    assert (metadata["draw_source"], metadata["repeats_are_free"]) == ("fixed", "false")
    assert json.loads(metadata["draws"]) == {"bag": 8, "vlad": 8}
    assert json.loads(metadata["input_types"]) == {"rgb": "uint8", "audio": "uint8"}
    assert metadata["weights_file"] == "null"
    assert metadata["fused_sha256"] == sha256_of(fused["bf16"].path)
    assert json.loads(metadata["validation"]) == {
        "metric": "gap", "score": 0.75, "k": 20, "videos": 1,
        "dataset_sha256": "0" * 64, "repeats": 1, "is_refit": False,
    }  # fmt: skip
    members = json.loads(metadata["members"])
    assert [(m["name"], m["coefficient"]) for m in members] == list(COEFFICIENTS.items())
    for member in members:
        assert member["checkpoint"] == {
            "path": f"../runs/{member['name']}/averaged.safetensors",
            "sha256": sha256_of(workspace.averaged(member["name"])),
        }
        recipe = workspace.path / "recipes" / f"{member['name']}.toml"
        assert member["recipe"]["text"] == recipe.read_text()
        assert f'name = "{MEMBERS[member["name"]]}"' in member["recipe"]["text"]


def test_no_path_of_this_machine_is_in_the_file(exported, workspace):
    content = exported.path.read_bytes()

    for path in (Path(ensemble_kit.__file__).parent, workspace.path, sys.prefix, Path.home()):
        assert len(str(path)) > 4
        assert str(path).encode() not in content
    assert b"site-packages" not in content
    assert b".py" not in content


def test_the_result_says_what_was_written(exported):
    assert (exported.repeats, exported.max_size) == (REPEATS, 2**30)
    assert exported.proof.exact_difference <= 1e-5


# What is refused


def test_a_file_over_the_limit_is_refused_with_what_would_fit(
    graph, built, exported, fused, tmp_path
):
    limit = 800 * 2**10
    fits = exported.num_bytes
    kept = export_onnx(fused["bf16"].path, tmp_path / "kept.onnx", repeats=REPEATS, max_size=fits)
    size = fits - len(_property(*proof_property(kept.proof).popitem()))  # refused before the proof
    folder = fused["bf16"].path.parent
    moved = tmp_path / "bf16.safetensors"
    moved.write_bytes(fused["bf16"].path.read_bytes())
    chosen = read_selection(folder / "selection.json")
    smallest = min(chosen.members, key=lambda member: member.bytes)
    best = FrontierMetadata(
        members=(smallest.name,),
        dtypes=("bf16",),
        score=0.25,
        confirmed_score=None,
        bytes=smallest.bytes,
    )
    problem = (
        f"The ONNX file has {size:,} bytes ({size / 2**10:.1f} KiB), {size - limit:,} bytes "
        f"({(size - limit) / 2**10:.1f} KiB) over the limit of 800.0 KiB."
    )

    in_int8 = chosen.shared_bytes + sum(m.model.bytes_by_dtype["int8"] for m in chosen.members)
    advice = (
        f"{problem} Without vlad it would fit and lose the least: GAP@20 0.5000, 0.2500 less. In "
        f"int8 all would fit, in {format_size(in_int8)}."
    )

    unknown = refused(SizeLimitError, moved, tmp_path / "e.onnx", max_size=limit)
    nothing = refused(SizeLimitError, fused["bf16"].path, tmp_path / "e.onnx", max_size=limit)
    with pytest.MonkeyPatch.context() as patch:
        larger = chosen.model_copy(update={"frontier": (best,)})
        patch.setattr("ensemble_kit.export.stage.read_selection", lambda _: larger)
        found = refused(SizeLimitError, fused["bf16"].path, tmp_path / "e.onnx", max_size=limit)

    assert kept.num_bytes == fits
    assert unknown == (
        f"{problem}\nSelect and fuse again with a smaller --max-size, or raise --max-size here."
    )
    assert nothing == (f"{advice}\nFuse with --dtype int8, or raise --max-size here.")
    room = limit - (size - fused["bf16"].num_bytes) - export.PROOF_BYTES
    assert found == (
        f"{advice} Of what selection measured, {smallest.name} would fit and score best: GAP@20 "
        f"0.2500 in {format_size(smallest.bytes)}.\n"
        f"Fuse with --dtype int8, select again with --max-size {room}, or raise --max-size here."
    )


def test_a_file_that_onnx_runtime_cannot_open_is_not_kept(graph, fused, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.checker, "check_model", lambda *_, **__: None)
    rename_an_operator(graph)

    message = refused(ExportError, fused["bf16"].path, tmp_path / "e.onnx")

    assert message.startswith(f"{tmp_path / 'e.onnx'}: ONNX Runtime cannot open it: ")
    assert message.endswith(f".\n{REPORT_IT}")


@pytest.mark.parametrize(("by", "said"), [(0.25, "0.25"), (np.nan, "nan")])
def test_a_file_that_computes_something_else_is_not_kept(
    by, said, graph, fused, tmp_path, monkeypatch
):
    expected = parity._expected

    def first_changed(*arguments):
        first, *others = expected(*arguments)
        return [first + by, *others]

    monkeypatch.setattr(parity, "_expected", first_changed)

    message = refused(ExportError, fused["bf16"].path, tmp_path / "e.onnx")

    assert message == (
        f"{tmp_path / 'e.onnx'}: ONNX Runtime's probabilities differ by {said} from PyTorch's on "
        f"1 video of 1 frame; the tolerance is 1e-05.\n{REPORT_IT}"
    )


def test_a_file_with_a_weight_of_another_type_is_not_kept(graph, fused, tmp_path):
    first = next(value.name for value in graph.input if value.name.startswith("member_"))

    message = refused(ExportError, fused["fp16"].path, tmp_path / "e.onnx")

    assert message == (
        f"{tmp_path / 'e.onnx'}: {first} is stored as BFLOAT16, not FLOAT16.\n{REPORT_IT}"
    )


def test_a_file_that_fails_onnxs_checker_is_not_kept(graph, fused, tmp_path, monkeypatch):
    def complain(model, full_check):
        assert full_check
        raise onnx.checker.ValidationError("No Op registered for Pool")

    monkeypatch.setattr(onnx.checker, "check_model", complain)

    message = refused(ExportError, fused["bf16"].path, tmp_path / "e.onnx")

    assert message == (
        f"{tmp_path / 'e.onnx'} fails onnx's checker: No Op registered for Pool.\n{REPORT_IT}"
    )


def rename_an_operator(graph):
    next(node for node in graph.node if node.op_type == "MatMul").op_type = "NoSuchOperator"


def normalise_along_an_axis_that_is_not_there(graph):
    node = next(node for node in graph.node if node.op_type == "Softmax")
    node.attribute[0].i = 9


@pytest.mark.parametrize("damage", [rename_an_operator, normalise_along_an_axis_that_is_not_there])
def test_a_graph_that_is_not_onnx_is_not_kept(damage, graph, fused, tmp_path):
    damage(graph)

    message = refused(ExportError, fused["bf16"].path, tmp_path / "e.onnx")

    assert message.startswith(f"{tmp_path / 'e.onnx'} fails onnx's checker: ")
    assert message.endswith(f"\n{REPORT_IT}")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_export_leaves_the_old_file(problem, graph, fused, tmp_path, monkeypatch):
    def stop(*_):
        raise problem

    monkeypatch.setattr(export, "_prove", stop)
    output = tmp_path / "e.onnx"
    output.write_bytes(b"the old file")

    with pytest.raises(problem):
        export_onnx(fused["bf16"].path, output, repeats=REPEATS, force=True)

    assert output.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [output]


def test_an_existing_file_is_refused_before_any_work(tmp_path):
    output = tmp_path / "e.onnx"
    output.touch()

    with pytest.raises(OutputError) as caught:
        export_onnx(tmp_path / "no.safetensors", output)

    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )


def test_what_is_no_fused_file_is_refused(workspace, tmp_path):
    missing, checkpoint = tmp_path / "no.safetensors", workspace.averaged("rnn")

    assert refused(CheckpointError, missing, tmp_path / "e.onnx") == (
        f"{missing} does not exist.\nName a file that exists."
    )
    assert refused(CheckpointError, checkpoint, tmp_path / "e.onnx") == (
        f"{checkpoint} is a checkpoint file, not a fused file.\nName a fused file instead."
    )


def test_a_fused_file_that_has_changed_is_not_exported_under_a_hash_of_its_own(fused, tmp_path):
    changed, output = tmp_path / "f.safetensors", tmp_path / "e.onnx"
    content = bytearray(fused["bf16"].path.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)

    assert refused(CheckpointError, changed, output) == (
        f"{changed} has changed since it was fused: the SHA-256 of its content is not the one it "
        "names.\nFuse again, or copy the file again from where it is whole."
    )
    assert not output.exists()
