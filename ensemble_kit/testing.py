"""Checks of a user's parts: what the kit's tests ask of its parts.

Each raises ``AssertionError`` with what does not hold. They belong in the tests of the package
that brings the part; see examples/own_pooling.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from ensemble_kit.choices import AnyPath, Dtype
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.export import export_onnx
from ensemble_kit.fusion import fuse
from ensemble_kit.layers.frame_preparation import mark_frames
from ensemble_kit.layers.protocols import (
    Gating,
    Head,
    Model,
    Sampling,
    SequencePooling,
    SetPooling,
)
from ensemble_kit.pipeline import train
from ensemble_kit.recipes.reading import load_recipe
from ensemble_kit.selection import select
from ensemble_kit.serving.session import OnnxEnsemble
from ensemble_kit.training.plan import RunPlan

WIDTHS = MappingProxyType({"rgb": 16, "audio": 8})
LENGTHS = (7, 4, 1)  # frames of the videos of a batch; the rest is padding


def check_set_pooling(pooling: SetPooling, *, num_features: int) -> None:
    """Check a pooling of sets: order, padding, weights, repeats, no frames, gradients.

    Args:
        pooling: The part, an ``nn.Module``; it is left in evaluation mode.
        num_features: D, the features of a frame.

    Raises:
        AssertionError: It is not what ``SetPooling`` describes.
    """
    module = _module(pooling).eval()
    rng = torch.Generator().manual_seed(0)
    frames = _frames(num_features, rng)
    weights = mark_frames(torch.tensor(LENGTHS), max(LENGTHS)).unsqueeze(1).float()
    with torch.no_grad():
        pooled = _pool(pooling, frames, weights)
        _require_shape(pooled, (len(LENGTHS), 1, pooling.output_size), "aggregate")

        order = torch.randperm(max(LENGTHS), generator=rng)
        _require_equal(
            _pool(pooling, frames[:, order], weights[:, :, order]),
            pooled,
            "in another order of frames",
        )
        filled = torch.where(weights[:, 0, :, None] > 0, frames, 10.0)
        _require_equal(
            _pool(pooling, filled, weights), pooled, "with something else in the padding"
        )

        counts = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 3.0], [0.0, 4.0, 0.0]])
        three = frames[:1, :3].contiguous()
        together = _pool(pooling, three, counts.unsqueeze(0))
        for row, count in enumerate(counts):
            drawn = three.repeat_interleave(count.long(), dim=1)
            alone = _pool(pooling, drawn, torch.ones(1, 1, drawn.shape[1]))
            _require_equal(together[:, row], alone[:, 0], "when frames are drawn, not weighted")

        _require_finite(_pool(pooling, frames, torch.zeros_like(weights)))
    _require_gradients(module, lambda: _pool(pooling, frames, weights))


def check_sequence_pooling(pooling: SequencePooling, *, num_features: int) -> None:
    """Check a pooling of sequences: shape, padding, no frames, gradients.

    Args:
        pooling: The part, an ``nn.Module``; it is left in evaluation mode.
        num_features: D, the features of a frame.

    Raises:
        AssertionError: It is not what ``SequencePooling`` describes.
    """
    module = _module(pooling).eval()
    frames = {"": _frames(num_features, torch.Generator().manual_seed(0))}
    _check_reader(
        module, lambda given, num_frames: pooling(given[""], num_frames), frames,
        size=pooling.output_size, what="the pooling",
    )  # fmt: skip


def check_gating(gating: Gating, *, num_features: int) -> None:
    """Check a gating: it keeps the shape, whatever stands before the features; gradients.

    Args:
        gating: The part, an ``nn.Module``; it is left in evaluation mode.
        num_features: F, the features of a vector.

    Raises:
        AssertionError: It is not what ``Gating`` describes.
    """
    module = _module(gating).eval()
    features = torch.randn(3, 2, num_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gated = gating(features)
        _require_shape(gated, tuple(features.shape), "the gating")
        _require_equal(gating(features[1]), gated[1], "alone")
    _require_gradients(module, lambda: gating(features))


def check_head(head: Head, *, num_features: int, num_classes: int) -> None:
    """Check a head: probabilities of every class, whatever stands before the features; gradients.

    Args:
        head: The part, an ``nn.Module``; it is left in evaluation mode.
        num_features: F, the features of a vector.
        num_classes: C.

    Raises:
        AssertionError: It is not what ``Head`` describes.
    """
    module = _module(head).eval()
    features = 10 * torch.randn(3, 2, num_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        probabilities = head(features)
        _require_shape(probabilities, (3, 2, num_classes), "the head")
        _require_equal(head(features[1]), probabilities[1], "alone")
    _require_probabilities(probabilities)
    known = {id(parameter) for parameter in module.parameters()}
    assert {id(kernel) for kernel in head.regularised()} <= known, (
        "regularised returns a tensor that is no parameter of the head."
    )
    _require_gradients(module, lambda: head(features))


def check_model(model: Model, *, widths: Mapping[str, int], num_classes: int) -> None:
    """Check a whole model: probabilities of every class, padding, no frames, gradients.

    Args:
        model: The part, an ``nn.Module``; it is left in evaluation mode.
        widths: D of each modality, by name.
        num_classes: C.

    Raises:
        AssertionError: It is not what ``Model`` describes.
    """
    module = _module(model).eval()
    rng = torch.Generator().manual_seed(0)
    frames = {name: _frames(width, rng) for name, width in widths.items()}
    probabilities = _check_reader(module, model, frames, size=num_classes, what="the model")
    _require_probabilities(probabilities)


def check_sampling(sampling: Sampling) -> None:
    """Check a sampling: weights of frames only, and indices that say the same.

    Args:
        sampling: The part.

    Raises:
        AssertionError: It is not what ``Sampling`` describes.
    """
    repeats = 3
    is_frame = mark_frames(torch.tensor((*LENGTHS, 0)), max(LENGTHS))
    rng = torch.Generator().manual_seed(0)
    count = sampling.num_draws
    draws = None if count is None else torch.rand(repeats, count, generator=rng)
    weights = sampling(is_frame, draws)
    rows = 1 if draws is None else repeats
    _require_shape(weights, (*is_frame.shape[:1], rows, is_frame.shape[1]), "the sampling")
    outside = weights.masked_select(~is_frame.unsqueeze(1).expand_as(weights))
    assert not outside.count_nonzero(), "Padding has a weight that is not 0."
    indices = sampling.indices(is_frame, draws)
    if indices is None:
        return
    for video, length in enumerate(LENGTHS):
        counted = torch.zeros(rows, length).scatter_add_(
            1, indices[video].expand(rows, -1), torch.ones(rows, indices.shape[-1])
        )
        _require_equal(counted, weights[video, :, :length], "counted by its indices")


def check_recipe(
    recipe: AnyPath, folder: AnyPath, *, dtypes: Sequence[Dtype] = ("bf16", "int4")
) -> None:
    """Take a recipe through the whole pipeline, on made-up records of rgb (16) and audio (8).

    Trains 4 steps of 8 videos, averages, predicts, selects, fuses and exports in each precision;
    each stage proves what it writes, and ONNX Runtime opens the result.

    Args:
        recipe: A recipe's name, or the path of its file.
        folder: An empty folder to work in.
        dtypes: The precisions to fuse in.

    Raises:
        EnsembleKitError: A stage refuses it, or a proof fails.
        AssertionError: The exported file gives numbers that are no probabilities.
    """
    folder = Path(folder)
    small = ["batch_size=8", "max_steps=4", "checkpoint_every=2", "average_last=2"]
    synthesize(
        folder / "records",
        num_videos={"train": 48, "validate": 24},
        modalities=WIDTHS,
        num_classes=6,
        frames=(2, 7),
    )
    train(
        RunPlan(
            recipe=load_recipe(recipe, [f"training.{each}" for each in small]),
            training=Records([folder / "records" / "train"]),
            validation=Records([folder / "records" / "validate"]),
            folder=folder / "runs" / "own",
        )
    )
    chosen = folder / "selection.json"
    select([folder / "runs" / "own" / "validation.safetensors"], output=chosen)
    for dtype in dtypes:
        fused, exported = folder / f"{dtype}.safetensors", folder / f"{dtype}.onnx"
        fuse(chosen, fused, dtype=dtype)
        export_onnx(fused, exported, force=True)
        _require_runs(OnnxEnsemble(exported))


def _require_runs(ensemble: OnnxEnsemble) -> None:
    frames = {name: np.zeros((2, 3, width), np.uint8) for name, width in WIDTHS.items()}
    probabilities = ensemble.run(frames, np.array([3, 0])).probabilities
    within = (probabilities >= 0) & (probabilities <= 1)  # False for NaN too
    assert within.all(), "The exported file gives numbers that are no probabilities."


def _module(part: object) -> nn.Module:
    assert isinstance(part, nn.Module), f"{type(part).__name__} is no torch.nn.Module."
    return part


def _pool(pooling: SetPooling, frames: Tensor, weights: Tensor) -> Tensor:
    return pooling.aggregate(pooling.describe(frames, weights[:, 0]), weights)


def _frames(num_features: int, rng: torch.Generator) -> Tensor:
    """Return frames ``(B, T, D)`` of videos of ``LENGTHS``, padding filled too."""
    return torch.randn(len(LENGTHS), max(LENGTHS), num_features, generator=rng)


def _check_reader(
    module: nn.Module,
    read: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    frames: Mapping[str, Tensor],
    *,
    size: int,
    what: str,
) -> Tensor:
    """Check what reads frames and counts: shape, padding, no frames, gradients; return its output.

    Args:
        module: The part.
        read: Calls it.
        frames: ``(B, T, D)`` by modality.
        size: How many numbers it returns of each video.
        what: What messages call it.
    """
    lengths = torch.tensor(LENGTHS)
    with torch.no_grad():
        together = read(frames, lengths)
        _require_shape(together, (len(LENGTHS), size), what)
        for video, length in enumerate(LENGTHS):
            own = {name: values[video : video + 1, :length] for name, values in frames.items()}
            alone = read(own, lengths[video : video + 1])
            _require_equal(alone[0], together[video], "without the padding")
        _require_finite(read(frames, torch.zeros_like(lengths)))
    _require_gradients(module, lambda: read(frames, lengths))
    return together


def _require_finite(of_no_frames: Tensor) -> None:
    assert of_no_frames.isfinite().all(), "A video of no frames gives numbers that are not finite."


def _require_probabilities(numbers: Tensor) -> None:
    assert bool(((numbers >= 0) & (numbers <= 1)).all()), "Not all are within [0, 1]."


def _require_shape(tensor: Tensor, shape: tuple[int, ...], what: str) -> None:
    found = tuple(tensor.shape)
    assert found == shape, f"Of shape {shape}, {what} returned {found}."


def _require_equal(ours: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(ours, expected, msg=lambda text: f"Not the same {what}.\n{text}")


def _require_gradients(module: nn.Module, run: Callable[[], Tensor]) -> None:
    """Refuse a part with a parameter that no output depends on, so that it never learns."""
    with torch.enable_grad():
        output = run()
        if not output.requires_grad:
            assert not list(module.parameters()), "The output has no gradient."
            return
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        torch.autograd.backward((output * weights).sum())
    dead = [name for name, value in module.named_parameters() if value.grad is None]
    assert not dead, f"No output depends on {', '.join(dead)}."
    broken = [name for name, value in module.named_parameters() if not _is_finite(value.grad)]
    module.zero_grad(set_to_none=True)
    assert not broken, f"The gradient of {', '.join(broken)} is not finite."


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())
