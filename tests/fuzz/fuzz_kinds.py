"""The kinds of files that the kit reads: whole ones, how each is damaged, and what reads it."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from builders import (
    interrupt_after,
    tiny_frames,
    tiny_recipe,
    tiny_recipe_text,
    tiny_records,
    tiny_schema,
    write_checkpoint,
)
from example_bytes import rated_record
from foreign_models import INPUTS, foreign_model, foreign_weights
from formats import (
    damage_message,
    damage_npy,
    damage_npz,
    damage_records,
    damage_safetensors,
    npy_bytes,
)
from harness import Kind
from mutators import damage_bytes, damage_json, damage_json_lines, damage_text, one_of
from onnx import TensorProto, helper, numpy_helper
from workspace_fixture import write_selection_of

from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.data.schema import Schema, read_label_names, read_schema, write_schema
from ensemble_kit.data.segments import rated_segments, read_ratings
from ensemble_kit.data.summary import summarise
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.data.tfrecord import write_records
from ensemble_kit.errors import OutputError
from ensemble_kit.export import export_onnx
from ensemble_kit.foreign.conversion import convert
from ensemble_kit.foreign.plan import ImportPlan
from ensemble_kit.fusion import fuse
from ensemble_kit.inference import evaluate_predictions
from ensemble_kit.networks.building import measure_recipe
from ensemble_kit.networks.loading import load
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.predictions.candidates import read_candidates
from ensemble_kit.predictions.challenge_csv import read_labels_csv
from ensemble_kit.predictions.file import (
    dataset_sha256,
    is_predictions_file,
    read_predictions,
)
from ensemble_kit.predictions.segment_csv import read_submission
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.recipes.reading import load_recipe
from ensemble_kit.report.timeline import read_timelines
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.store.runs import list_runs
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.loop import Trainer
from ensemble_kit.training.plan import RunPlan
from ensemble_kit.training.processes import join
from ensemble_kit.training.state import position_of
from ensemble_kit.verification import verify

NAMES = (
    "predictions", "npy", "npz", "ids", "challenge CSV", "label CSV", "label names", "schema",
    "recipe", "segments CSV", "windows", "log", "checkpoint", "fused", "selection", "exported",
    "state", "frame records", "video records", "rated records", "foreign",
)  # fmt: skip
NUM_VIDEOS, NUM_CLASSES = 4, 3
IDS = ("a", "bb", "c", "d")
LABELS = LabelLists.from_lists([[0], [1, 2], [], [2]])
PROBABILITIES = np.linspace(0, 1, NUM_VIDEOS * NUM_CLASSES, dtype=np.float32).reshape(4, 3)


def kinds(folder: Path) -> dict[str, Kind]:
    """Write whole files of every kind into a folder, and return the kinds by name."""
    makers = (_predictions, _arrays, _texts, _models, _training, _records, _foreign)
    return {kind.name: kind for make in makers for kind in make(folder)}


# Predictions


def _predictions(folder: Path) -> list[Kind]:
    originals = []
    for top_k in (None, 2):
        path = folder / f"top{top_k}.safetensors"
        names = [f"class {index}" for index in range(NUM_CLASSES)]
        write_predictions(
            path, ids=IDS, label_names=names, labels=LABELS, rows=PROBABILITIES, name=path.stem,
            model=None, top_k=top_k, force=True,
        )  # fmt: skip
        originals.append(path.read_bytes())
    damage = one_of(*[damage_safetensors(_hash_again)] * 4, damage_bytes)
    good = folder / "good.safetensors"
    write_predictions(
        good, ids=IDS, label_names=names, labels=LABELS, rows=PROBABILITIES, name="good",
        model=None, force=True,
    )  # fmt: skip
    return [
        Kind("predictions", "p.safetensors", tuple(originals), damage, _score_beside(good)),
    ]


def _hash_again(metadata: dict[str, Any], tensors: dict[str, list[Any]]) -> None:
    """Make a predictions file's hash that of its videos and labels, whatever these are now."""
    try:
        offsets, classes = (
            np.frombuffer(tensors[name][2], np.int64) for name in ("label_offsets", "label_classes")
        )
        ids = tensors["ids"][2].decode(errors="replace").split("\n")
        metadata["dataset_sha256"] = dataset_sha256(ids, LabelLists(offsets, classes))
    except (KeyError, ValueError):
        pass


def _score_beside(good: Path, labels: Path | None = None) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        is_predictions_file(path)
        predictions = read_predictions(path)
        for _ in predictions.blocks():
            pass
        candidates = read_candidates(
            [good, path],
            labels_path=labels,
            dtypes=("bf16",),
            sizes={},
            has_limit=False,
            intersect=True,
        )
        for candidate in candidates.candidates:
            candidate.taken(np.arange(len(candidates.ids)))
        candidates.labels.dense(candidates.num_classes)
        evaluate_predictions(predictions, labels)

    return read


def _arrays(folder: Path) -> list[Kind]:
    good = folder / "good.safetensors"
    scored = _score_beside(good, _write_labels(folder))
    labels = LABELS.dense(NUM_CLASSES)
    names = np.array(["class 0", "class 1", "class 2"])
    arrays = [PROBABILITIES, PROBABILITIES.astype(np.float64), np.asfortranarray(PROBABILITIES)]
    zipped = []
    for save in (np.savez, np.savez_compressed):
        held = io.BytesIO()
        save(held, probabilities=PROBABILITIES, ids=np.array(IDS), labels=labels, label_names=names)
        zipped.append(held.getvalue())
    npy = tuple(npy_bytes(array) for array in arrays)
    return [
        Kind("npy", "p.npy", npy, one_of(damage_npy, damage_npy, damage_bytes),
             _with_ids(scored)),
        Kind("npz", "p.npz", tuple(zipped), one_of(damage_npz, damage_npz, damage_bytes),
             _score_beside(good)),
        Kind("ids", "p.ids.txt", ("\n".join(IDS).encode() + b"\n",),
             one_of(damage_text, damage_bytes), _read_ids(npy[0])),
    ]  # fmt: skip


def _write_labels(folder: Path) -> Path:
    path = folder / "labels.csv"
    path.write_text("VideoId,Labels\na,0\nbb,1 2\nc,\nd,2\n")
    return path


def _with_ids(read: Callable[[Path], None]) -> Callable[[Path], None]:
    def read_with_ids(path: Path) -> None:
        path.with_name("p.ids.txt").write_text("\n".join(IDS) + "\n")
        read(path)

    return read_with_ids


def _read_ids(array: bytes) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        path.with_name("p.npy").write_bytes(array)
        read_predictions(path.with_name("p.npy"))

    return read


# Text


def _texts(folder: Path) -> list[Kind]:
    lines = ["a,0 0.9 2 0.1", "bb,1 1", "c,", "d,2 1e-05 0 5e-324"]
    csv = "\n".join(["VideoId,LabelConfidencePairs", *lines]) + "\n"
    labels = _write_labels(folder)
    names = 'index,mid,display_name\n0,/m/0,"Guitar, acoustic"\n1,/m/1,Nike, Inc.\n2,/m/2,Kät\n'
    text = one_of(damage_text, damage_text, damage_bytes)
    recipes = [tiny_recipe_text(pooling=name) for name in ("netvlad", "gru", "attention_netvlad")]
    run = [
        {"step": 1, "examples": 16, "epoch": 0, "loss": 1.5, "learning_rate": 0.1},
        {"step": 2, "examples": 32, "epoch": 0, "validation": {"gap": 0.5, "videos": 20}},
        {"step": 2, "examples": 32, "epoch": 1, "state": "finished", "seconds": 1.25},
    ]
    log = "".join(json.dumps(line) + "\n" for line in run).encode()
    schema = tiny_schema(label_names=["x", "y", "z", "w"])
    path = folder / "schema.toml"
    write_schema(schema, path, force=True)
    log_damage = one_of(damage_json_lines, damage_json_lines, damage_text, damage_bytes)
    windows = "".join(
        json.dumps(
            {"video": video, "start": 5.0 * place, "end": 5.0 * place + 5,
             "labels": [{"label": "Guitar", "class": 1, "confidence": 0.5}]}
        ) + "\n"
        for video in ("v", "w") for place in range(3)
    ).encode()  # fmt: skip
    segments = b"Class,Segments\n3,v:0 w:55 v:5\n0,w:0\n7,\n"
    return [
        Kind("challenge CSV", "p.csv", (csv.encode(),), text,
             _score_beside(folder / "good.safetensors", labels)),
        Kind("label CSV", "labels.csv", (labels.read_bytes(),), text, _read_labels),
        Kind("label names", "names.csv", (names.encode(),), text,
             lambda path: read_label_names(path, 3)),
        Kind("schema", "schema.toml", (path.read_bytes(),), text, _read_schema),
        Kind("recipe", "r.toml", tuple(map(str.encode, recipes)), text, _read_recipe, 4),
        Kind("segments CSV", "s.csv", (segments,), text, lambda path: list(read_submission(path))),
        Kind("windows", "w.jsonl", (windows,), log_damage, read_timelines),
        Kind("log", "runs/a/metrics.jsonl", (log,), log_damage, _read_log),
    ]  # fmt: skip


def _read_labels(path: Path) -> None:
    _, labels = read_labels_csv(path, num_classes=NUM_CLASSES)
    labels.dense(NUM_CLASSES)
    _, labels = read_labels_csv(path)
    labels.dense(int(labels.classes.max(initial=0)) + 1)


def _read_schema(path: Path) -> None:
    schema = read_schema(path)
    schema.vocabulary_sha256  # noqa: B018 - computes the names of all classes


def _read_recipe(path: Path) -> None:
    recipe = load_recipe(str(path))
    measure_recipe(recipe, tiny_schema())


def _read_log(path: Path) -> None:
    list_runs(path.parents[1])


# Tensors of models


def _models(folder: Path) -> list[Kind]:
    schema = tiny_schema(label_names=["x", "y", "z", "w"])
    batch = _batch(schema)
    paths = {}
    for name in ("average", "netvlad", "gru"):
        paths[name] = folder / f"{name}.safetensors"
        recipe = tiny_recipe(pooling=name, name=name)
        write_checkpoint(paths[name], recipe, schema, name=name)
    checkpoints = tuple(path.read_bytes() for path in paths.values())
    whole = write_selection_of(
        folder / "selection.json", paths, {"average": 0.25, "netvlad": 0.5, "gru": 0.25}
    )
    fused = [fuse(whole, folder / f"{dtype}.safetensors", dtype=dtype).path for dtype in _DTYPES]
    onnx_path = export_onnx(fused[1], folder / "e.onnx", repeats=2).path
    message = one_of(damage_message, damage_message, damage_bytes)
    return [
        Kind("checkpoint", "c.safetensors", checkpoints, _TENSORS, _run_model(batch), 20),
        Kind("fused", "f.safetensors", tuple(path.read_bytes() for path in fused), _TENSORS,
             _verify_and_run(batch), 40),
        Kind("selection", "s.json", (whole.read_bytes(),), one_of(damage_json, damage_json,
        damage_text,
             damage_bytes), _fuse_from(folder), 20),
        Kind("exported", "e.onnx", (onnx_path.read_bytes(),), message, _verify_and_run(batch), 40),
    ]  # fmt: skip


_DTYPES = ("bf16", "fp32")
_TENSORS = one_of(*[damage_safetensors()] * 5, damage_bytes)


def _batch(schema: Schema) -> Batch:
    generator = torch.Generator().manual_seed(0)
    frames, num_frames = tiny_frames(schema, [3, 1], generator)
    arrays = {name: values.numpy() for name, values in frames.items()}
    return Batch(
        ids=("a", "b"),
        labels=LabelLists.from_lists([[0], [1]]),
        frames=arrays,
        num_frames=num_frames.numpy(),
        epoch=0,
    )


def _run_model(batch: Batch) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        model = load(path)
        if model.schema.interface == tiny_schema().interface:
            model.probabilities(batch)

    return read


def _verify_and_run(batch: Batch) -> Callable[[Path], None]:
    run = _run_model(batch)

    def read(path: Path) -> None:
        if path.suffix == ".onnx":
            read_metadata(path)
        verify(path)
        run(path)

    return read


def _fuse_from(folder: Path) -> Callable[[Path], None]:
    """Return what fuses by a selection that lies in the folder of its members."""

    def read(path: Path) -> None:
        beside = folder / "damaged.json"
        beside.write_bytes(path.read_bytes())
        fuse(beside, path.with_suffix(".safetensors"), force=True)

    return read


# A run that goes on


def _training(folder: Path) -> list[Kind]:
    records, _ = tiny_records(folder / "data", num_videos=32)
    recipe = tiny_recipe(pooling="netvlad", batch_size=4)
    states, plans = [], []
    for name, ema in (("plain", None), ("ema", 0.9)):
        plan = RunPlan(
            recipe=recipe, training=records, validation=None, folder=folder / name, ema=ema
        )
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 3)
            train_checkpoints(plan)
        states.append(plan.run.state.read_bytes())
        plans.append(plan)
    return [Kind("state", "plain/state.safetensors", tuple(states), _TENSORS, _go_on(plans), 20)]


def _go_on(plans: list[RunPlan]) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for plan in plans:
            plan = replace(plan, folder=path.parent)
            try:
                found = plan.find_state(force=False)
            except OutputError:  # the state of the other one
                continue
            assert found is not None
            model = SubModel(plan.recipe, plan.training.schema)
            Trainer(plan, model, position_of(found), join("cpu"), None).restore()

    return read


def _records(folder: Path) -> list[Kind]:
    kinds = []
    for level in ("frame", "video"):
        schema = synthesize(
            folder / level, num_videos={"train": 3}, modalities={"rgb": 5, "audio": 3},
            num_classes=4, frames=(1, 3), level=level, num_shards=1,
        )  # fmt: skip
        original = (folder / level / "train" / "train0000.tfrecord").read_bytes()
        damage = one_of(damage_records, damage_records, damage_records, damage_bytes)
        kinds.append(
            Kind(f"{level} records", f"{level}.tfrecord", (original,), damage, _read_all(schema), 2)
        )
    schema = tiny_schema(widths={"rgb": 3, "audio": 2}, num_classes=4, value_type="uint8")
    rated = folder / "rated.tfrecord"
    segments = [
        rated_record("v", [0, 0], [3, 1], [1, 0]), rated_record("w", [0], [2], [1])
    ]  # fmt: skip
    write_records(rated, segments, force=True)
    kinds.append(
        Kind("rated records", "r.tfrecord", (rated.read_bytes(),), damage, _read_rated(schema), 2)
    )
    return kinds


def _read_rated(schema: Schema) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for skips in (True, False):
            records = Records([path], schema=schema, skip_bad_records=skips)
            list(rated_segments(records))
            list(read_ratings(records))

    return read


def _read_all(schema: Schema) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        for _ in Records([path], schema=schema, skip_bad_records=True).batches(2):
            pass
        summarise(Records([path]))
        for _ in Records([path], schema=schema).training_batches(2, seed=0, epochs=1):
            pass

    return read


# Models of other frameworks


def _foreign(folder: Path) -> list[Kind]:
    schema = tiny_schema(widths={"rgb": 7}, num_classes=6)
    weights = foreign_weights()
    small = {"fc1/w": weights["fc1/w"][:, :5], "fc1/b": weights["fc1/b"][:5],
             "fc2/w": weights["fc2/w"][:, :5], "fc2/b": weights["fc2/b"]}  # fmt: skip
    originals = [
        foreign_model(opset=opset, weights=small, weights_are_inputs=opset == 12)
        for opset in (11, 12)
    ]
    originals.append(_branching_model())
    damage = one_of(damage_message, damage_message, damage_message, damage_bytes)

    def read(path: Path) -> None:
        convert(
            ImportPlan(
                model=path, output=path.with_suffix(".safetensors"), data_schema=schema,
                name="foreign", inputs={"rgb": ("pixels",)}, num_frames="lengths", is_frame=None,
                probabilities=None, frames="dequantised", activation="sigmoid", lengths=(5,),
                force=True,
            )
        )  # fmt: skip

    written = tuple(model.SerializeToString() for model in originals)
    return [Kind("foreign", "m.onnx", written, damage, read, 40, is_apart=True)]


def _branching_model() -> onnx.ModelProto:
    """Return a model with constants, a branch and its own function.

    And with no loop: one of 2^62 turns ends only with its process.
    """
    node, info = helper.make_node, helper.make_tensor_value_info
    float_type = TensorProto.FLOAT

    def branch(name: str, operator: str) -> onnx.GraphProto:
        return helper.make_graph(
            [node(operator, ["mean"], [name])], name, [], [info(name, float_type, None)]
        )

    twice = helper.make_function(
        "own",
        "Twice",
        ["x"],
        ["y"],
        [node("Add", ["x", "x"], ["y"])],
        [helper.make_opsetid("", 17)],
    )
    array = numpy_helper.from_array
    weight = np.linspace(-1, 1, 42, dtype=np.float32).reshape(7, 6)
    graph = helper.make_graph(
        [
            node("Constant", [], ["axes"], value=array(np.array([1]))),
            node("Constant", [], ["step"], value_float=0.5),
            node("Constant", [], ["true"], value=array(np.array(True))),
            node("ReduceSum", ["pixels", "axes"], ["sum"], keepdims=0),
            node("Cast", ["lengths"], ["count"], to=float_type),
            node("Unsqueeze", ["count", "axes"], ["counts"]),
            node("Div", ["sum", "counts"], ["mean"]),
            node("If", ["true"], ["branched"], then_branch=branch("a", "Relu"),
                 else_branch=branch("b", "Neg")),
            node("Add", ["branched", "step"], ["stepped"]),
            node("Twice", ["stepped"], ["doubled"], domain="own"),
            node("MatMul", ["doubled", "weight"], ["scores"]),
        ],
        "branching",
        [info(name, *value) for name, value in INPUTS.items()],
        [info("scores", float_type, ["n", 6])],
        [array(weight, "weight")],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=[twice])
