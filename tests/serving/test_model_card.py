import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ensemble_kit.data.encode import dequantise, quantise
from ensemble_kit.errors import ExportError
from ensemble_kit.files import sha256_of
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.measuring import measure_serving
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.model_card import (
    MARK,
    javascript_lines,
    model_card,
    six_lines,
    write_card,
)


@pytest.fixture(scope="module")
def card(exported):
    return model_card(exported.path, read_metadata(exported.path), None)


def front_matter(card):
    """Return what stands between the two lines of dashes; each value is JSON, hence YAML."""
    first, text, _ = card.split("---\n", 2)
    assert first == ""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in lines)}


def row(card, name):
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_the_front_matter_is_what_hubs_read(card):
    assert front_matter(card) == {
        "library_name": "onnxruntime",
        "pipeline_tag": "video-classification",
        "tags": ["ensemble-kit", "onnx", "video-tagging"],
        "model-index": [
            {
                "name": "ensemble",
                "results": [
                    {
                        "task": {"type": "video-classification"},
                        "dataset": {"name": "validation", "type": f"sha256:{'0' * 64}"},
                        "metrics": [{"type": "gap", "name": "GAP@20", "value": 0.75}],
                    }
                ],
            }
        ],
    }


def test_the_score_of_folds_is_not_taken_for_that_of_the_final_members(exported):
    metadata = read_metadata(exported.path)
    validation = metadata.validation.model_copy(update={"is_refit": True, "metric": "macro-map"})

    card = model_card(exported.path, metadata.model_copy(update={"validation": validation}), None)

    (_, words) = row(card, "macro mAP on validation")
    assert words.endswith(
        "of the members' weighted mean, each trained without the videos; the members here were "
        "trained on all of them"
    )


def test_six_lines_of_python_run_the_file_without_the_kit(card, exported, tmp_path):
    code = card.split("```python\n")[1].split("```")[0]
    lines = code.splitlines()
    hide = "import sys; sys.modules.update({'ensemble_kit': None, 'torch': None})\n"

    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", hide + code],
        capture_output=True, text=True, check=True, cwd=exported.path.parent, timeout=60,
    )  # fmt: skip

    assert len(lines) == len(list(filter(None, lines))) == 6
    frames = {"rgb": np.zeros((1, 300, 7), np.uint8), "audio": np.zeros((1, 300, 3), np.uint8)}
    tags = OnnxEnsemble(exported.path).run(frames, np.array([300]))
    assert result.stdout == f"{tags.labels[0]} {tags.confidences[0]}\n"


def test_the_card_says_what_the_file_is_and_where_it_comes_from(card, exported, fused):
    metadata = read_metadata(exported.path)

    size = exported.num_bytes
    assert row(card, "`ensemble.onnx`") == [
        "`ensemble.onnx`", f"{size:,} bytes, SHA-256 `{sha256_of(exported.path)}`"
    ]  # fmt: skip
    assert row(card, "size of all that is needed")[1] == f"{size:,} bytes ({size / 1024:.1f} KiB)"
    assert row(card, "weights")[1] == "stored as bf16, computed in float32"
    assert row(card, "repeats")[1] == "3 random frame samples, averaged"
    assert row(card, "draw source")[1].startswith("a table of uniform numbers in the file")
    assert row(card, "GAP@20 on validation")[1].startswith("0.7500 on 1 video, 1 draw a video: ")
    assert row(card, "exported from a fused file")[1] == f"SHA-256 `{metadata.fused_sha256}`"
    for member in metadata.members:
        assert row(card, member.name) == [
            member.name,
            f"{member.coefficient:.4f}",
            f"`{member.recipe.name}`",
            "bf16",
            f"{member.num_values:,}",
            f"`{member.checkpoint.sha256}`",
        ]
        assert f"```toml\n{member.recipe.text.strip()}\n```" in card
    assert row(card, "`audio`") == ["`audio`", "uint8", "(batch, frames, 3)"]
    assert row(card, "`num_frames`") == ["`num_frames`", "int64", "(batch)"]
    assert (
        "```text\n0 steady 0\n1 burst 1\n2 order 2\n3 steady 3\n4 burst 4\n5 order 5\n```" in card
    )
    assert str(exported.path.parent) not in card


def test_what_a_file_does_not_have_is_left_out_of_its_card(exported):
    many = tuple(f"class\n{index}" for index in range(1234))
    metadata = read_metadata(exported.path)
    foreign = metadata.members[0].model_copy(update={"recipe": None})
    metadata = metadata.model_copy(
        update={"label_names": many, "validation": None, "draws": {}, "members": (foreign,)}
    )

    card = model_card(exported.path, metadata, None)

    assert "\n99 class 99\n... and 1,134 more\n```" in card
    assert "GAP" not in card
    assert "model-index" not in front_matter(card)
    assert "| repeats |" not in card
    assert "| draws |" not in card
    assert row(card, foreign.name)[2] == "made by another framework"
    assert "<details>" not in card


def test_draws_that_are_an_input_are_in_the_six_lines(exported):
    metadata = read_metadata(exported.path).model_copy(update={"draw_source": "input"})

    code = six_lines(exported.path, metadata).splitlines()

    assert len(code) == 6
    assert code[3].endswith(
        '"num_frames": np.array([300]), '
        '"draws_bag": np.random.rand(1, 3, 8).astype(np.float32), '
        '"draws_vlad": np.random.rand(1, 3, 8).astype(np.float32)}'
    )


def test_only_a_card_of_the_kits_is_replaced_and_only_if_asked(exported, tmp_path):
    path = tmp_path / "ensemble.onnx"
    path.symlink_to(exported.path)
    card = tmp_path / "README.md"

    assert write_card(path, read_metadata(path), None, force=False) == card
    assert MARK in card.read_text().splitlines()
    card.write_text(f"old\n{MARK}\n")
    assert write_card(path, read_metadata(path), None, force=False) is None
    assert card.read_text() == f"old\n{MARK}\n"
    assert write_card(path, read_metadata(path), None, force=True) == card
    assert card.read_text() == model_card(Path(path), read_metadata(path), None)
    card.write_text("My own words.\n")
    assert write_card(path, read_metadata(path), None, force=True) is None
    assert card.read_text() == "My own words.\n"


def test_nothing_in_a_file_ends_a_fence_or_a_cell_of_its_card(exported):
    metadata = read_metadata(exported.path)
    first = metadata.members[0]
    recipe = first.recipe.model_copy(
        update={"text": "````\n# Another card\x1b[2J", "overrides": ("a=`|b\n| c |",)}
    )
    hostile = metadata.model_copy(
        update={"members": (first.model_copy(update={"recipe": recipe}),), "kit_version": "1`x"}
    )

    card = model_card(exported.path, hostile, None)

    assert "`````toml\n````\n# Another card\\x1b[2J\n`````\n" in card
    assert "`a='/b / c /`" in card
    assert "Made by ensemble-kit `1'x`." in card


def test_the_card_says_how_bytes_are_made_as_records_have_them(card, exported):
    (line,) = [line for line in card.splitlines() if line.startswith("Features are ")]

    assert line.startswith("Features are 1 a second, at most 300 of a video. Bytes of `rgb` and ")
    assert "`round((clip(x, -2, 2) + 2) * 255 / 4)`" in line
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    made = np.array([round((min(max(float(x), -2), 2) + 2) * 255 / 4) for x in values])
    assert (quantise(values) == made).all()
    assert np.allclose(dequantise(quantise(values)), made * 4 / 255 + 4 / 512 - 2, atol=1e-6)

    metadata = read_metadata(exported.path)
    floats = metadata.model_copy(update={"input_types": dict.fromkeys(("rgb", "audio"), "float32")})
    text = model_card(exported.path, floats, None)
    assert "Numbers of `rgb` and `audio` are features as the records hold them" in text
    assert "Bytes of" not in text


def test_javascript_gives_each_input_its_type_and_shape(exported):
    assert javascript_lines(exported.path, read_metadata(exported.path)).splitlines() == [
        'import ort from "onnxruntime-node"',
        'const session = await ort.InferenceSession.create("ensemble.onnx")',
        "const feed = {",
        '  "rgb": new ort.Tensor("uint8", new Uint8Array(300 * 7), [1, 300, 7]),',
        '  "audio": new ort.Tensor("uint8", new Uint8Array(300 * 3), [1, 300, 3]),',
        '  "num_frames": new ort.Tensor("int64", [300n], [1]),',
        "}",
        "const { labels, confidences } = await session.run(feed)",
        "console.log(labels.data, confidences.data)",
    ]


def test_seconds_and_memory_are_those_of_a_new_process(exported):
    served = measure_serving(exported.path, 300)

    assert served.frames == 300
    assert 0 < served.video_seconds < 60
    assert 0 < served.open_seconds < 60
    assert 10 * 2**20 < served.peak_bytes < 2**30
    card = model_card(exported.path, read_metadata(exported.path), None, served)
    assert row(card, "one video")[1] == (
        f"{served.video_seconds:.4f} s: 300 frames of zeros on the CPU, the median of 5 runs after "
        "one more"
    )
    assert row(card, "memory")[1].endswith(" at most, Python and ONNX Runtime included")
    assert served.machine in row(card, "measured on")[1]
    with pytest.raises(ExportError) as caught:
        measure_serving(exported.path.with_name("no.onnx"), 300)
    assert "could not be measured: " in caught.value.problem
