"""Small recipes, schemas, frames and checkpoints that many tests build on."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from ensemble_kit.data.dataset import Batch, Records
from ensemble_kit.data.schema import Modality, Schema
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.layers.normalisation import BatchNorm
from ensemble_kit.layers.second_order import WhitenedResiduals
from ensemble_kit.networks.sub_model import SubModel
from ensemble_kit.recipes.reading import Recipe, parse_recipe
from ensemble_kit.store import tensor_files as checkpoints
from ensemble_kit.store.provenance import (
    NO_HASH,
    CheckpointMetadata,
    FusedMetadata,
    RecipeMetadata,
)
from ensemble_kit.store.tensor_files import open_tensors, save_tensors
from ensemble_kit.training import train_checkpoints
from ensemble_kit.training.plan import RunPlan, TrainedRun

Module = TypeVar("Module", bound=nn.Module)
WIDTHS = {"rgb": 5, "audio": 3}
POOLINGS = {
    "average": "",
    "dbof": 'num_clusters = { rgb = 4, other = 2 }\nactivation = "relu"\nover_frames = "max"',
    "soft_bof": "num_clusters = { rgb = 4, other = 2 }",
    "gated_bof": "num_clusters = { rgb = 4, other = 2 }\ngate_rank = 3",
    "netvlad": "num_clusters = { rgb = 3, other = 2 }",
    "netrvlad": "num_clusters = { rgb = 3, other = 2 }",
    "net_fv": "num_clusters = { rgb = 3, other = 2 }",
    "second_order": "num_clusters = { rgb = 3, other = 2 }\nreduced_size = { rgb = 3, other = 2 }",
    "nextvlad": "num_clusters = 3\nexpansion = 2\nnum_groups = 2",
    "attention_netvlad": "num_clusters = 3\nnum_heads = 1\nencode_frames = true\n"
    'encode_clusters = true\nsimilarity = "attention"',
    "gru": 'hidden_size = 4\nnum_layers = 2\nstate = "all"',
    "lstm": 'hidden_size = 4\nnum_layers = 2\nstate = "all"',
    "bigru": 'hidden_size = 3\nnum_layers = 2\nstate = "last"',
    "bilstm": 'hidden_size = 3\nnum_layers = 2\nstate = "all"',
    "attention_bigru": "embedding_size = 4\nhidden_size = 3\nnum_layers = 1\nattention_size = 2",
}
IN_ORDER = ["gru", "lstm", "bigru", "bilstm", "attention_bigru"]
SAMPLINGS = {
    "random": 'name = "random"\nnum_frames = 8',
    "random_sequence": 'name = "random_sequence"\nnum_frames = 5',
    "uniform": 'name = "uniform"\nnum_frames = 6',
    "all": 'name = "all"',
}
HEADS = {
    "logistic": 'name = "logistic"',
    "mixture_of_experts": 'name = "mixture_of_experts"\nnum_experts = 2',
}


def tiny_recipe_text(
    *,
    pooling: str = "netvlad",
    modality_fusion: str = "late",
    sampling: str | None = None,
    batch_norm: bool | None = None,
    gating: str | None = "context_gating",
    head: str = "mixture_of_experts",
    probability_gating: bool = False,
    **training: float,
) -> str:
    """Return a recipe as TOML.

    Args:
        pooling: A key of ``POOLINGS``.
        modality_fusion: ``late`` or ``early``.
        sampling: A key of ``SAMPLINGS``; None takes random frames for cluster poolings, else all.
        batch_norm: Of the input; None has it for cluster poolings.
        gating: Of a hidden projection to 6 features; None leaves the projection out.
        head: A key of ``HEADS``.
        probability_gating: Whether the head's probabilities are gated.
        training: Keys of the table ``training`` to set.
    """
    has_clusters = pooling not in {"average", *IN_ORDER}
    schedule = {
        "batch_size": 16,
        "learning_rate": 0.01,
        "learning_rate_decay": 0.9,
        "examples_per_decay": 10_000,
        "max_steps": 6,
        "clip_norm": 1.0,
        "l2_penalty": 1e-6,
        "batch_norm_momentum": 0.1,
        "checkpoint_every": 2,
        "average_last": 2,
        **training,
    }
    tables = {
        "source": 'paper = "none"',
        "input": f"batch_norm = {_toml(has_clusters if batch_norm is None else batch_norm)}",
        "sampling": SAMPLINGS[sampling or ("random" if has_clusters else "all")],
        "pooling": f'name = "{pooling}"\n'
        f'modality_fusion = "{modality_fusion}"\n{POOLINGS[pooling]}',
        "hidden": f'size = 6\ngating = "{gating}"',
        "head": f"{HEADS[head]}\nprobability_gating = {_toml(probability_gating)}",
        "training": "\n".join(f"{key} = {value}" for key, value in schedule.items()),
    }
    if gating is None:
        del tables["hidden"]
    return 'title = "Tiny"\n' + "".join(f"\n[{name}]\n{text}\n" for name, text in tables.items())


def tiny_recipe(*, name: str = "tiny", overrides: Sequence[str] = (), **parts: object) -> Recipe:
    """Return a recipe; ``parts`` are the arguments of ``tiny_recipe_text``."""
    text = tiny_recipe_text(**parts)
    return parse_recipe(RecipeMetadata(name=name, text=text, overrides=tuple(overrides)))


def tiny_schema(
    *,
    widths: Mapping[str, int] = WIDTHS,
    num_classes: int = 4,
    value_type: str = "float32",
    label_names: Sequence[str] | None = None,
) -> Schema:
    """Return a frame-level schema."""
    modalities = [
        Modality(name=name, key=name, width=width, value_type=value_type)
        for name, width in widths.items()
    ]
    return Schema(
        level="frame",
        modalities=modalities,
        id_key="id",
        labels_key="labels",
        num_classes=num_classes,
        label_names=label_names,
    )


def tiny_frames(
    schema: Schema, num_frames: Sequence[int], rng: torch.Generator, *, length: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Return frames ``(B, T, D)`` of each modality, padding filled too, and ``num_frames``."""
    shape = len(num_frames), length or max(num_frames)
    frames = {
        m.name: torch.randint(0, 256, (*shape, m.width), generator=rng, dtype=torch.uint8)
        if m.value_type == "uint8"
        else torch.randn(*shape, m.width, generator=rng)
        for m in schema.modalities
    }
    return frames, torch.tensor(num_frames)


def stir(model: Module) -> Module:
    """Give every batch norm a scale, a shift and statistics as if it had been trained.

    Whitened residuals too: theirs are of vectors of length 1.
    """
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.scale.data.uniform_(0.5, 2.0)
            layer.shift.data.normal_()
            layer.running_mean.normal_()
            layer.running_variance.uniform_(0.5, 2.0)
        elif isinstance(layer, WhitenedResiduals):
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_variance.uniform_(0.1, 0.5)
    return model


def tiny_model(recipe: Recipe, schema: Schema, *, seed: int = 0) -> SubModel:
    """Return a sub-model in evaluation mode whose batch norms have seen something."""
    torch.manual_seed(seed)
    return stir(SubModel(recipe, schema)).eval()


def write_checkpoint(
    path: Path,
    recipe: Recipe,
    schema: Schema,
    *,
    seed: int = 0,
    step: int = 2,
    run: str = "run",
    name: str = "tiny",
    training_files: Sequence[str] = (),
) -> SubModel:
    """Write the checkpoint of a made-up sub-model, and return it; ``seed`` makes its weights."""
    model = tiny_model(recipe, schema, seed=seed)
    metadata = CheckpointMetadata(
        kit_version="0.0",
        name=name,
        run=run,
        recipe=recipe.metadata,
        data_schema=schema,
        step=step,
        examples=step * recipe.training.batch_size,
        seed=0,
        training_files=tuple(training_files),
    )
    save_tensors(path, model.state_dict(), metadata, force=False)
    return model


def contents_of(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file."""
    with open_tensors(path) as file:
        return {name: tensor.clone() for name, tensor in file.tensors()}


def metadata_of(path: Path) -> CheckpointMetadata:
    """Return what a checkpoint says of itself."""
    with open_tensors(path) as file:
        return file.metadata_as(CheckpointMetadata)


def rewrite_checkpoint(
    path: Path, tensors: Mapping[str, Tensor] | None = None, **changes: object
) -> None:
    """Write a checkpoint again with other tensors, or other values in its metadata."""
    metadata = metadata_of(path).model_copy(update=changes)
    save_tensors(path, tensors or contents_of(path), metadata, force=True)


def tiny_records(folder: Path, *, num_videos: int = 96, seed: int = 0) -> tuple[Records, Records]:
    """Write records of rgb (8) and audio (4), five classes; return training and validation."""
    synthesize(
        folder,
        num_videos={"train": num_videos, "validate": 40},
        modalities={"rgb": 8, "audio": 4},
        num_classes=5,
        frames=(2, 7),
        num_shards=2,
        seed=seed,
    )
    return Records([folder / "train"]), Records([folder / "validate"])


def train_tiny(
    folder: Path,
    records: tuple[Records, Records],
    recipe: Recipe | None = None,
    *,
    is_validated: bool = False,
    force: bool = False,
    **options: Any,
) -> TrainedRun:
    """Train a tiny recipe on what ``tiny_records`` returned; ``options`` are those of a plan."""
    training, validation = records
    plan = RunPlan(
        recipe=recipe or tiny_recipe(),
        training=training,
        validation=validation if is_validated else None,
        folder=folder,
        **options,
    )
    return train_checkpoints(plan, force=force)


def lines_of(trained: TrainedRun) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in trained.folder.metrics.read_text("utf-8").splitlines()]


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Make Ctrl-C come while batch ``num_batches + 1`` is read."""
    whole = Records.training_batches

    def training_batches(self: Records, *arguments: Any, **options: Any) -> Iterator[Batch]:
        for number, batch in enumerate(whole(self, *arguments, **options)):
            if number == num_batches:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(Records, "training_batches", training_batches)


def interrupt_the_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Ctrl-C come when a file's third tensor is written, once two are in the file."""
    whole = checkpoints._as_bytes
    turns = iter(range(3))

    def as_bytes(tensor: Any) -> Any:
        if next(turns) == 2:
            raise KeyboardInterrupt
        return whole(tensor)

    monkeypatch.setattr(checkpoints, "_as_bytes", as_bytes)


def _toml(value: bool) -> str:
    return "true" if value else "false"


def bytes_by_dtype(in_bf16: int) -> dict[str, int]:
    """Return what a made-up member takes in each precision."""
    shares = {"fp32": 2.0, "fp16": 1.0, "bf16": 1.0, "int8": 0.5, "int4": 0.25}
    return {dtype: int(in_bf16 * share) for dtype, share in shares.items()}


def seal(path: Path) -> None:
    """Let a fused file that was changed name the hash of its content, as one just fused does."""
    with open_tensors(path) as file:
        named = file.metadata_as(FusedMetadata).content_sha256.encode()
    content = path.read_bytes()
    start = content.index(named, content.index(b"content_sha256"))
    stop = start + len(named)
    digest = hashlib.sha256(content[:start] + NO_HASH.encode() + content[stop:]).hexdigest()
    path.write_bytes(content[:start] + digest.encode() + content[stop:])
