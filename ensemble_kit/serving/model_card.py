"""The model card beside an ONNX file: a ``README.md`` with front matter, as the Hub reads it."""

import json
import re
from collections.abc import Sequence
from os.path import exists
from pathlib import Path
from typing import Any

from ensemble_kit.files import format_size, sha256_of, written_aside
from ensemble_kit.serving.calibration import Calibration
from ensemble_kit.serving.calibration_facts import calibration_facts
from ensemble_kit.serving.measuring import RUNS, Served
from ensemble_kit.serving.signature import Port, inputs_of, outputs_of
from ensemble_kit.store.provenance import (
    InputMetadata,
    MappingMetadata,
    MemberMetadata,
    OnnxMetadata,
    ValidationMetadata,
    dtypes_of,
)
from ensemble_kit.wording import counted, printable

CARD = "README.md"
MARK = "# Written by ensemble-kit export-onnx; without this line it is never replaced."
MAX_NAMES = 100  # classes that a card lists; the file has all
DRAW_SOURCES = {
    "fixed": "a table of uniform numbers in the file, so that a video always gets the same tags",
    "random": "fresh in each run; a session that is open cannot be seeded",
    "input": "an input of the file",
}
ACTIVATIONS = {
    "none": "probabilities as they are",
    "sigmoid": "a sigmoid makes probabilities of it",
    "softmax": "a softmax makes probabilities of it",
}


def write_card(
    path: Path,
    metadata: OnnxMetadata,
    calibration: Calibration | None,
    *,
    force: bool,
    served: Served | None = None,
) -> Path | None:
    """Write the card of an ONNX file beside it.

    Args:
        path: The ONNX file.
        metadata: What the file says of itself, which its export has in hand.
        calibration: What the file carries; None where it is not calibrated.
        force: Whether another card may be replaced; what a person wrote never is.
        served: What serving the file took, if that was measured.

    Returns:
        The card's path, or None where one was left as it is.

    Raises:
        OutputError: The disk refuses the card.
    """
    card = path.with_name(CARD)
    if exists(card) and not (force and MARK in card.read_text("utf-8", "replace").splitlines()):
        return None
    text = model_card(path, metadata, calibration, served)
    with written_aside(card, force=force) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
    return card


def model_card(
    path: Path,
    metadata: OnnxMetadata,
    calibration: Calibration | None,
    served: Served | None = None,
) -> str:
    """Return the card of an ONNX file: what it is, how to run it, where it comes from.

    Of the file itself only the sizes and the hash are read.
    """
    parts = [
        _front_matter(path, metadata),
        f"# {path.stem}",
        f"{counted(len(metadata.members), 'sub-model')} in one ONNX graph that tags videos with "
        f"{counted(metadata.data_schema.num_classes, 'class', 'classes')}. Made by "
        f"ensemble-kit {_code(metadata.kit_version)}.",
        _facts(path, metadata),
        "## Run it",
        f"```python\n{six_lines(path, metadata)}\n```",
        "The names of the classes are in the file, as a JSON list: "
        '`session.get_modelmeta().custom_metadata_map["ensemble_kit.label_names"]`.',
        "In JavaScript, with `onnxruntime-node` or `onnxruntime-web`:",
        f"```javascript\n{javascript_lines(path, metadata)}\n```",
        "## Inputs and outputs",
        _ports([*inputs_of(metadata), *outputs_of(metadata)]),
        "`batch` and `frames` are free. Frames from `num_frames` on are padding and never matter. "
        "`labels` are the most probable classes, the most probable first; `confidences` are their "
        "probabilities.",
        _how_inputs_are_made(metadata),
        *_time_and_memory(served),
        *([] if calibration is None else ["## Tags", _tags(path, calibration)]),
        "## Members",
        _members(metadata),
        *(_recipe(each.name, each.recipe.text) for each in metadata.members if each.recipe),
        *(_mapping(each.name, each.mapping) for each in metadata.members if each.mapping),
        "## Classes",
        _classes(metadata.label_names),
    ]
    return "\n\n".join(parts) + "\n"


def six_lines(path: Path, metadata: OnnxMetadata) -> str:
    """Return Python that runs a file with NumPy and ONNX Runtime alone."""
    feed = ", ".join(f'"{port.name}": {_example(port, metadata)}' for port in inputs_of(metadata))
    return "\n".join(
        [
            "import numpy as np",
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({json.dumps(path.name)})",
            f"feed = {{{feed}}}",
            "probabilities, labels, confidences = session.run(None, feed)",
            "print(labels[0], confidences[0])",
        ]
    )


def javascript_lines(path: Path, metadata: OnnxMetadata) -> str:
    """Return JavaScript that runs a file."""
    feed = [
        f"  {json.dumps(port.name)}: {_javascript_example(port, metadata)},"
        for port in inputs_of(metadata)
    ]
    return "\n".join(
        [
            'import ort from "onnxruntime-node"',
            f"const session = await ort.InferenceSession.create({json.dumps(path.name)})",
            "const feed = {",
            *feed,
            "}",
            "const { labels, confidences } = await session.run(feed)",
            "console.log(labels.data, confidences.data)",
        ]
    )


def _javascript_example(port: Port, metadata: OnnxMetadata) -> str:
    shape = [1, *port.example]
    if port.name == "num_frames":
        return f'new ort.Tensor("int64", [{inputs_of(metadata)[0].example[0]}n], [1])'
    array = "Uint8Array" if port.value_type == "uint8" else "Float32Array"
    sizes = " * ".join(map(str, port.example))
    values = f"new {array}({sizes})"
    if port.name not in metadata.data_schema.widths:  # draws are not all 0
        values += ".map(Math.random)"
    return f'new ort.Tensor("{port.value_type}", {values}, {json.dumps(shape)})'


def _how_inputs_are_made(metadata: OnnxMetadata) -> str:
    schema = metadata.data_schema
    lines = []
    if schema.level == "frame":
        lines.append(
            f"Features are {schema.frames_per_second:g} a second, at most {schema.max_frames} of a "
            "video."
        )
    by_type = {kind: [name for name, each in metadata.input_types.items() if each == kind]
               for kind in ("uint8", "float32")}  # fmt: skip
    if by_type["uint8"]:
        lines.append(
            f"Bytes of {_names(by_type['uint8'])} are `round((clip(x, -2, 2) + 2) * 255 / 4)` of "
            "features x, as YouTube-8M's and AudioSet's records have them; the graph computes with "
            "`byte * 4 / 255 + 4 / 512 - 2`."
        )
    if by_type["float32"]:
        lines.append(
            f"Numbers of {_names(by_type['float32'])} are features as the records hold them, or "
            "`byte * 4 / 255 + 4 / 512 - 2` of records that hold bytes; they are not normalised."
        )
    return " ".join(lines)


def _names(names: Sequence[str]) -> str:
    return " and ".join(map(_code, names))


def _time_and_memory(served: Served | None) -> list[str]:
    """Say what serving the file took, and what exactly was measured."""
    if served is None:
        return []
    rows = [
        ("to open the file", f"{served.open_seconds:.2f} s"),
        (
            "one video",
            f"{served.video_seconds:.4f} s: {counted(served.frames, 'frame')} of zeros on the CPU, "
            f"the median of {RUNS} runs after one more",
        ),
    ]
    if served.peak_bytes is not None:
        rows.append(
            (
                "memory",
                f"{format_size(served.peak_bytes)} at most, Python and ONNX Runtime included",
            )
        )
    rows.append(("measured on", f"{_code(served.machine)}, {_code(served.software)}"))
    return ["## Time and memory", _table(("", ""), rows)]


def _example(port: Port, metadata: OnnxMetadata) -> str:
    shape = (1, *port.example)
    if port.name == "num_frames":
        return f"np.array([{inputs_of(metadata)[0].example[0]}])"
    if port.name in metadata.data_schema.widths:
        return f"np.zeros({shape}, np.{port.value_type})"
    return f"np.random.rand{shape}.astype(np.{port.value_type})"


def _front_matter(path: Path, metadata: OnnxMetadata) -> str:
    """Return YAML, each value written as JSON, which YAML reads."""
    values: dict[str, Any] = {
        "library_name": "onnxruntime",
        "pipeline_tag": "video-classification",
        "tags": ["ensemble-kit", "onnx", "video-tagging"],
    }
    if metadata.validation is not None:
        values["model-index"] = [{"name": path.stem, "results": [_result(metadata.validation)]}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", MARK, *lines, "---"])


def _result(validation: ValidationMetadata) -> dict[str, Any]:
    return {
        "task": {"type": "video-classification"},
        "dataset": {"name": "validation", "type": f"sha256:{validation.dataset_sha256}"},
        "metrics": [
            {"type": validation.metric, "name": validation.metric_name, "value": validation.score}
        ],
    }


def _facts(path: Path, metadata: OnnxMetadata) -> str:
    beside = metadata.weights_file
    hashes = [sha256_of(path), *([beside.sha256] if beside else [])]
    sizes = [file.stat().st_size for file in metadata.files(path)]
    rows = [
        (f"`{file.name}`", f"{size:,} bytes, SHA-256 `{digest}`")
        for file, size, digest in zip(metadata.files(path), sizes, hashes, strict=True)
    ]
    size = sum(sizes)
    rows.append(("size of all that is needed", f"{size:,} bytes ({format_size(size)})"))
    precisions = " and ".join(dtypes_of(metadata.members))
    rows.append(("weights", f"stored as {precisions}, computed in float32"))
    if metadata.draws:
        rows.append(("repeats", f"{metadata.repeats} random frame samples, averaged"))
        rows.append(("draw source", DRAW_SOURCES[metadata.draw_source]))
    validation = metadata.validation
    if validation is not None:
        times = f"{validation.repeats} draw{'s' if validation.repeats > 1 else ''} a video"
        rows += [
            (
                f"{validation.metric_name} on validation",
                f"{validation.score:.4f} on {counted(validation.videos, 'video')}, {times}: of the "
                "members' weighted mean, "
                + (
                    "each trained without the videos; the members here were trained on all of them"
                    if validation.is_refit
                    else "measured when they were selected"
                ),
            ),
            ("validation videos and labels", f"SHA-256 `{validation.dataset_sha256}`"),
        ]
    rows.append(("exported from a fused file", f"SHA-256 `{metadata.fused_sha256}`"))
    return _table(("", ""), rows)


def _ports(ports: Sequence[Port]) -> str:
    rows = []
    for port in ports:
        shape = ", ".join(map(str, ("batch", *port.shape)))
        rows.append((f"`{port.name}`", port.value_type, f"({shape})"))
    return _table(("name", "type", "shape"), rows)


def _tags(path: Path, calibration: Calibration) -> str:
    """Say how probabilities are calibrated, and what tags over the thresholds are worth."""
    facts = calibration_facts(calibration, path)
    error, gap = facts.expected_calibration_error, facts.gap
    rows = [
        (
            f"{level.min_precision:g}",
            "none" if level.precision is None else f"{level.precision:.4f}",
            f"{level.recall:.4f}",
        )
        for level in facts.levels
    ]
    code = json.dumps(path.name)
    return "\n\n".join(
        [
            "The file carries calibrated probabilities and a threshold of each class for a wished "
            "precision, in the property `ensemble_kit.calibration`. They change no output of the "
            "graph; Python applies them:",
            "```python\nfrom ensemble_kit.runtime import OnnxEnsemble\n"
            f"OnnxEnsemble({code}).tags(frames, num_frames, min_precision=0.9)\n```",
            f"Calibrated by {_code(calibration.method)} on {counted(facts.videos, 'video')}. On a "
            f"half of them, {counted(facts.measured_on, 'video')}, fitted on the other: expected "
            f"calibration error {error.before:.5f} before and {error.after:.5f} after, GAP@20 "
            f"{gap.before:.4f} and {gap.after:.4f}.",
            _table(("precision wished for", "precision", "recall"), rows),
        ]
    )


def _members(metadata: OnnxMetadata) -> str:
    rows = [
        (
            member.name,
            f"{member.coefficient:.4f}",
            _origin(member),
            member.dtype,
            f"{member.num_values:,}",
            f"`{member.checkpoint.sha256}`",
        )
        for member in metadata.members
    ]
    return _table(
        ("member", "coefficient", "recipe", "precision", "numbers", "SHA-256 of checkpoint"), rows
    )


def _origin(member: MemberMetadata) -> str:
    if member.recipe is None:
        return "made by another framework"
    return " ".join(map(_code, (member.recipe.name, *member.recipe.overrides)))


def _recipe(name: str, text: str) -> str:
    summary = f"<details><summary>Recipe of {name}</summary>"
    return f"{summary}\n\n{_fenced(text.strip(), 'toml')}\n\n</details>"


def _mapping(name: str, mapping: MappingMetadata) -> str:
    """Say what the graph of a member of another framework is given, and what its output is."""
    rows = [(_code(each.name), _given(each, mapping.frames)) for each in mapping.inputs]
    rows.append(("its output", ACTIVATIONS[mapping.activation]))
    return _table((f"input of {name}", "what it is given"), rows)


def _given(value: InputMetadata, frames: str) -> str:
    if value.holds == "frames":
        layout = ", features before frames" if value.layout == "channels-first" else ""
        return f"frames of {' + '.join(value.modalities)}, {frames}{layout}"
    return f"`{value.holds}`"


def _classes(names: Sequence[str]) -> str:
    lines = [f"{index} {' '.join(name.split())}" for index, name in enumerate(names[:MAX_NAMES])]
    if len(names) > MAX_NAMES:
        lines.append(f"... and {len(names) - MAX_NAMES:,} more")
    return _fenced("\n".join(lines), "text")


def _fenced(text: str, language: str) -> str:
    """Return a block of text whose fence is longer than any in it, so that none there ends it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"


def _code(text: str) -> str:
    """Return text as code within a line or a cell of a table, which nothing in it ends."""
    return f"`{printable(' '.join(text.split())).replace('`', chr(39)).replace('|', '/')}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
