"""A package that brings a part for each place of a recipe, as an installer would leave it."""

from pathlib import Path

SOURCE = '''
import torch
from torch import nn

from ensemble_kit.parts import HeadTable, ModelTable, PartError, PartTable, PoolingTable, Size


class First(nn.Module):
    """The frames' largest values, scaled."""

    class Table(PoolingTable):
        scale: Size

    loops_over_repeats = False
    not_products = frozenset({"scales"})

    def __init__(self, *, num_features, scale):
        super().__init__()
        if scale == 13:
            raise PartError("scale", "13 brings bad luck", advice="12")
        if scale == 14:
            raise OSError("no disk")
        self.output_size = self.projection_fan_in = num_features
        self.scales = nn.Parameter(torch.full((1, num_features), float(scale)))

    def describe(self, frames, row_weights):
        return (frames * self.scales,)

    def aggregate(self, described, frame_weights):
        (frames,) = described
        seen = frame_weights.unsqueeze(-1) > 0
        return torch.where(seen, frames.unsqueeze(1), -9.0).amax(dim=2)


class Last(nn.Module):
    """The last frame."""

    def __init__(self, *, num_features):
        super().__init__()
        self.output_size = self.projection_fan_in = num_features

    def forward(self, frames, num_frames):
        last = (num_frames - 1).clamp_min(0).long()
        return frames[torch.arange(len(frames)), last] * (num_frames > 0).unsqueeze(1)


class Half(nn.Module):
    """Every second frame."""

    num_frames = num_draws = None

    def forward(self, is_frame, draws=None):
        even = torch.arange(is_frame.shape[1]) % 2 == 0
        return (is_frame & even).unsqueeze(1).float()

    def indices(self, is_frame, draws=None):
        return None


class Sum(nn.Module):
    """The first modality's descriptor alone."""

    num_modalities = last_penalty = None

    def __init__(self, *, sizes):
        super().__init__()
        self.output_size = sizes[0]

    def forward(self, pooled):
        return pooled[0]


class Scale(nn.Module):
    """A gate of one number."""

    class Table(PartTable):
        by: float

    def __init__(self, *, num_features, by):
        super().__init__()
        self.by = nn.Parameter(torch.full((num_features,), by))

    def forward(self, features):
        return features * self.by


class Softmax(nn.Module):
    """Classes that exclude each other."""

    class Table(HeadTable):
        temperature: float = 1.0

    def __init__(self, *, num_features, num_classes, temperature):
        super().__init__()
        self.temperature = temperature
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, features):
        return (self.linear(features) / self.temperature).softmax(dim=-1)

    def regularised(self):
        return [self.linear.weight]


class Whole(nn.Module):
    """Attention over the frames of all modalities, and a linear layer for each class."""

    class Table(ModelTable):
        size: Size
        classes_too_many: int = 0

    def __init__(self, *, widths, num_classes, size, classes_too_many):
        super().__init__()
        self.embed = nn.Linear(sum(widths.values()), size)
        self.attention = nn.MultiheadAttention(size, 2, batch_first=True)
        self.output = nn.Linear(size, num_classes + classes_too_many)

    def forward(self, frames, num_frames):
        embedded = self.embed(torch.cat(list(frames.values()), dim=-1))
        length = embedded.shape[1]
        is_frame = torch.arange(length, device=num_frames.device) < num_frames.unsqueeze(1)
        mask = ~(is_frame | (torch.arange(length) == 0))  # the first stays, also where none is
        attended, _ = self.attention(
            embedded, embedded, embedded, key_padding_mask=mask, need_weights=False
        )
        weights = is_frame.unsqueeze(-1).to(attended.dtype)
        mean = (attended * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
        return self.output(mean).sigmoid()

    def regularised(self):
        return [self.output.weight]


class Deciding(Whole):
    """A model whose steps depend on its numbers."""

    def forward(self, frames, num_frames):
        probabilities = super().forward(frames, num_frames)
        return probabilities if probabilities.sum() > 1 else 1 - probabilities


class Lame(nn.Module):
    """No pooling."""

    def describe(self, frames, row_weights):
        return (frames,)

'''
PARTS = {
    "first": "First",
    "last": "Last",
    "half": "Half",
    "sum": "Sum",
    "scale": "Scale",
    "softmax": "Softmax",
    "whole": "Whole",
    "deciding": "Deciding",
    "lame": "Lame",
    "absent": "Absent",
}


def install(folder: Path, *, version: str = "0.1.0") -> Path:
    """Write the package ``Own.Parts`` and what tells Python of it; return the folder."""
    (folder / "own_parts_of_tests.py").write_text(SOURCE, encoding="utf-8")
    about = folder / f"own_parts-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: Own.Parts\nVersion: {version}\n", encoding="utf-8"
    )
    lines = [f"{name} = own_parts_of_tests:{part}" for name, part in PARTS.items()]
    (about / "entry_points.txt").write_text(
        "\n".join(["[ensemble_kit.parts]", *lines]), encoding="utf-8"
    )
    return folder
