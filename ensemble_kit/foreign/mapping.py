"""Which input of a foreign graph is given what."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, get_args

from ensemble_kit.choices import Layout
from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import ForeignModelError
from ensemble_kit.networks.foreign import ForeignModel
from ensemble_kit.networks.foreign_inputs import GraphInput
from ensemble_kit.store.provenance import InputMetadata
from ensemble_kit.wording import counted

Inputs: TypeAlias = Mapping[str, str | Sequence[str]]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DIMENSIONS = {
    "frames": "(videos, frames, features)",
    "num_frames": "(videos,) or (videos, 1)",
    "is_frame": "(videos, frames), with or without dimensions of size 1",
}


def map_inputs(
    path: Path,
    names: Sequence[str],
    schema: Schema,
    *,
    inputs: Inputs,
    num_frames: str | None,
    is_frame: str | None,
) -> tuple[InputMetadata, ...]:
    """Return what each input of a graph is given.

    Args:
        path: The file that errors name.
        names: The inputs of the graph.
        schema: The modalities.
        inputs: The input or inputs for each modality, or for several side by side, such as
            ``rgb+audio``. ``:channels-first`` or ``:frames-first`` after an input's name says how
            its dimensions are ordered. Modalities that inputs are named after need not be given.
        num_frames: The input for the number of frames.
        is_frame: The input for the mask that tells frames from padding.

    Raises:
        ForeignModelError: A modality or an input does not exist, an input is mapped twice or not at
            all.
    """
    asked = []
    for modalities, values in inputs.items():
        for value in [values] if isinstance(values, str) else values:
            name, layout = _layout_of(value)
            parts = _modalities_of(modalities, name, schema)
            asked.append(InputMetadata(name=name, holds="frames", modalities=parts, layout=layout))
    if num_frames is not None:
        asked.append(InputMetadata(name=num_frames, holds="num_frames"))
    if is_frame is not None:
        asked.append(InputMetadata(name=is_frame, holds="is_frame"))
    mapped: dict[str, InputMetadata] = {}
    for each in asked:
        if mapped.setdefault(each.name, each) != each:
            raise _mapped_twice(path, mapped[each.name], each)
    for name in set(schema.widths) & set(names) - set(mapped):
        mapped[name] = InputMetadata(name=name, holds="frames", modalities=(name,))
    for name in mapped:
        if name not in names:
            raise ForeignModelError(
                f"{path} has no input {name!r} that its output depends on; it has "
                f"{', '.join(names)}.",
                hint="Map these inputs, and no others.",
            )
    for name in names:
        if name not in mapped:
            raise ForeignModelError(
                f"{path}: nothing is mapped to its input {name}.",
                hint=f"Add --input MODALITY={name}, --num-frames {name} or --is-frame {name}.",
            )
    return tuple(mapped[name] for name in names)


def _layout_of(value: str) -> tuple[str, Layout]:
    """Return an input's name and layout; other colons belong to the name, as in ``x:0``."""
    for layout in LAYOUTS:
        if value.endswith(f":{layout}"):
            return value.removesuffix(f":{layout}"), layout
    return value, LAYOUTS[0]


def _modalities_of(names: str, value: str, schema: Schema) -> tuple[str, ...]:
    modalities = tuple(names.split("+"))
    for modality in modalities:
        if modality not in schema.widths:
            raise ForeignModelError(
                f"{modality!r} is not a modality of these records, which hold "
                f"{', '.join(schema.widths)}.",
                hint=f"Use --input MODALITY={value} with one of them, or with several: "
                f"{'+'.join(schema.widths)}={value}.",
            )
    return modalities


def _mapped_twice(path: Path, first: InputMetadata, second: InputMetadata) -> ForeignModelError:
    both = [
        f"{'+'.join(each.modalities)} ({each.layout})" if each.modalities else each.holds
        for each in (first, second)
    ]
    joined = "+".join(dict.fromkeys((*first.modalities, *second.modalities)))
    return ForeignModelError(
        f"{path}: its input {first.name} is mapped twice, to {both[0]} and to {both[1]}.",
        hint=f"Map it once. For frames side by side use --input {joined}={first.name}."
        if first.modalities and second.modalities and first.layout == second.layout
        else "Map it once.",
    )


def check_inputs(model: ForeignModel, path: Path, explicit: frozenset[str] = frozenset()) -> None:
    """Raise ``ForeignModelError`` unless each input can take what is mapped to it.

    Args:
        model: The model.
        path: The file that errors name.
        explicit: The inputs whose layout was given and not assumed.
    """
    for given in model.inputs:
        holds = given.metadata.holds
        if given.rank not in _ranks(given, model) or _is_odd_mask(given):
            raise ForeignModelError(
                f"{path}: the input {given.name} is {given.shown}; {holds} must be "
                f"{DIMENSIONS[holds]}.",
                hint="Map another input, or export the model with such an input.",
            )
        if given.sizes and given.sizes[0] is not None:
            raise ForeignModelError(
                f"{path}: the input {given.name} is {given.shown}, which takes exactly "
                f"{counted(given.sizes[0], 'video')} at a time.",
                hint="Export the model with a free number of videos.",
            )
        if holds == "frames":
            _check_frames(given, model, path, is_explicit=given.name in explicit)


def explicit_layouts(inputs: Inputs) -> frozenset[str]:
    """Return the names of those inputs whose layout is given."""
    values = [[each] if isinstance(each, str) else each for each in inputs.values()]
    return frozenset(
        _layout_of(value)[0] for group in values for value in group if value != _layout_of(value)[0]
    )


def _ranks(given: GraphInput, model: ForeignModel) -> tuple[int, ...]:
    """Return how many dimensions an input may have."""
    if given.metadata.holds == "frames":  # a record of one mean vector has one frame
        return (2, 3) if model.schema.level == "video" else (3,)
    return (1, 2) if given.metadata.holds == "num_frames" else (2, 3, 4)


def _is_odd_mask(given: GraphInput) -> bool:
    """Return whether no dimension, or more than one, of a mask can count the frames."""
    return given.metadata.holds == "is_frame" and given.rank > 2 and len(given.mask_axes) != 1


def _check_frames(given: GraphInput, model: ForeignModel, path: Path, *, is_explicit: bool) -> None:
    modalities = "+".join(given.metadata.modalities)
    width = sum(model.schema.widths[modality] for modality in given.metadata.modalities)
    if given.rank == 3 and given.sizes and not is_explicit:
        _refuse_guess(given, path, modalities, width)
    if given.sizes and given.sizes[given.feature_axis] not in (None, width):
        raise ForeignModelError(
            f"{path}: the input {given.name} is {given.shown}, but {modalities} has {width} "
            "features per frame.",
            hint="Map the modalities that it was trained on, in their order.",
        )
    form = model.mapping.frames
    if form != "raw" and not given.dtype.is_floating_point:
        raise ForeignModelError(
            f"{path}: the input {given.name} holds {str(given.dtype).removeprefix('torch.')}, but "
            f"{form} frames are fractions.",
            hint="Use --frames raw.",
        )


def _refuse_guess(given: GraphInput, path: Path, modalities: str, width: int) -> None:
    """Refuse an input whose dimensions do not say where its features are.

    Frames before features is what the kit feeds. It is certain only where the last dimension has
    the modality's width and the one before it has not, or where neither has it and a number of
    frames is fixed. Two free dimensions are decided by the proof, which runs the graph with other
    numbers of frames than features.
    """
    middle, last = given.sizes[1:]
    if middle != width:
        return
    hint = f"Use --input {modalities}={given.name}:channels-first if features come before frames"
    if last in (None, width):
        hint += f", or {modalities}={given.name}:frames-first if they come after"
    raise ForeignModelError(
        f"{path}: the input {given.name} is {given.shown}, and {modalities} has {width} features "
        f"per frame, so that its second dimension ({middle}) may count features rather than "
        f"frames, and its third ({last or '?'}) frames.",
        hint=f"{hint}.",
    )
