"""What export's options change: where draws come from, the type of frames, where weights lie."""

import errno
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from builders import tiny_recipe, tiny_schema, write_checkpoint
from workspace_fixture import write_selection_of

from ensemble_kit.choices import MAX_SIZE
from ensemble_kit.data.dataset import Batch
from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import CheckpointError, ExportError, OutputError, SizeLimitError
from ensemble_kit.export import export_onnx, parity
from ensemble_kit.export import stage as export
from ensemble_kit.files import sha256_of
from ensemble_kit.fusion.stage import fuse
from ensemble_kit.layers.frame_preparation import dequantise
from ensemble_kit.networks.ensemble import example_frames
from ensemble_kit.networks.loading import load, load_fused
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.onnx_file import needed_files, opened, read_tensors
from ensemble_kit.serving.session import OUTPUTS, OnnxEnsemble
from ensemble_kit.store.tensor_files import open_tensors
from ensemble_kit.verification import verify

SCHEMA = tiny_schema(value_type="uint8")
ORDER = 1e-6  # float32 sums in another order: some eps of a probability
REPEATS = 3
OLD = b"the old file"


def fused_of(folder, **recipes):
    """Fuse made-up members, mixed unequally."""
    paths = {name: folder / f"{name}.safetensors" for name in recipes}
    for seed, (name, recipe) in enumerate(recipes.items()):
        write_checkpoint(paths[name], tiny_recipe(**recipe), SCHEMA, seed=seed)
    coefficients = dict(zip(paths, {1: [1.0], 2: [0.75, 0.25]}[len(paths)], strict=True))
    selection = write_selection_of(folder / "selection.json", paths, coefficients)
    return fuse(selection, folder / "fused.safetensors", dtype="bf16").path


def files_of(path):
    return needed_files(path, read_tensors(path))


@pytest.fixture(scope="module")
def fused_pair(tmp_path_factory):
    """Two members that draw frames at random, one of them in order."""
    folder = tmp_path_factory.mktemp("pair")
    sequence = {"pooling": "gru", "sampling": "random"}
    return fused_of(folder, one={"pooling": "soft_bof"}, two=sequence)


@pytest.fixture(scope="module")
def with_inputs(fused_pair):
    """The pair with draws as inputs, and its weights in a second file."""
    path = fused_pair.with_name("input.onnx")
    return export_onnx(fused_pair, path, repeats=REPEATS, draw_source="input", low_memory=True)


class Drawing(NamedTuple):
    """A file that draws afresh in each run, and the draws that were compared with PyTorch's."""

    path: Path
    drawn: list[dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def drawing(fused_pair):
    """The pair with fresh draws in each run, of frames that are numbers already."""
    path, drawn = fused_pair.with_name("random.onnx"), []
    expected = parity._expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_expected", lambda *a: drawn.extend(a[2]) or expected(*a))
        export_onnx(fused_pair, path, repeats=REPEATS, draw_source="random", input_type="float32")
    return Drawing(path, drawn)


def torch_of(fused, repeats):
    with open_tensors(fused) as file:
        return load_fused(file, repeats=repeats)


def arrays(batch_size=4, length=7):
    frames, num_frames = example_frames(SCHEMA, batch_size, length)
    return {name: values.numpy() for name, values in frames.items()}, num_frames.numpy()


def tensors(frames, num_frames):
    return {k: torch.from_numpy(v) for k, v in frames.items()}, torch.from_numpy(num_frames)


# Draws that are inputs


@pytest.mark.parametrize("repeats", [1, 2, 5, None])
def test_repeats_may_be_changed_after_export(repeats, with_inputs, fused_pair):
    frames, num_frames = arrays()

    found = OnnxEnsemble(with_inputs.path).run(frames, num_frames, repeats=repeats).probabilities

    with torch.inference_mode():
        expected = torch_of(fused_pair, repeats or REPEATS)(*tensors(frames, num_frames))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ORDER)


def test_given_draws_are_those_that_are_made(with_inputs, fused_pair):
    frames, num_frames = arrays()
    random = np.random.default_rng(0)
    draws = {name: random.random((4, 2, 8), dtype=np.float32) for name in ("one", "two")}

    found = OnnxEnsemble(with_inputs.path).run(frames, num_frames, draws=draws).probabilities

    ensemble = torch_of(fused_pair, 1)
    given = {name: torch.from_numpy(values) for name, values in draws.items()}
    with torch.inference_mode():
        expected = ensemble.mix(ensemble.shares(*tensors(frames, num_frames), given))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ORDER)


def test_other_repeats_can_be_asked_for_when_a_file_is_loaded(with_inputs, fused_pair):
    frames, num_frames = arrays()
    batch = Batch(tuple("abcd"), frames, num_frames, LabelLists.from_lists([[]] * 4))

    loaded = load(with_inputs.path, repeats=5)

    assert loaded.repeats == 5
    np.testing.assert_allclose(
        loaded.probabilities(batch),
        load(fused_pair, repeats=5).probabilities(batch),
        rtol=0,
        atol=ORDER,
    )


def test_a_pooling_that_takes_repeats_one_by_one_fixes_their_number(tmp_path):
    fused = fused_of(tmp_path, one={"pooling": "gated_bof"})

    path = export_onnx(fused, tmp_path / "e.onnx", repeats=2, draw_source="input").path

    frames, num_frames = arrays()
    with torch.inference_mode():
        expected = torch_of(fused, 2)(*tensors(frames, num_frames))
    session = OnnxEnsemble(path)
    assert not read_metadata(path).repeats_are_free
    np.testing.assert_allclose(
        session.run(frames, num_frames).probabilities, expected, rtol=0, atol=ORDER
    )
    with pytest.raises(ValueError, match=r"^draws_one has 2 repeats, which cannot be changed$"):
        session.run(frames, num_frames, repeats=3)
    assert load(path, repeats=2).repeats == 2
    with pytest.raises(CheckpointError) as caught:
        load(path, repeats=3)
    assert str(caught.value) == (
        f"{path} was exported for 2 repeats; --repeats cannot change that.\n"
        "Leave --repeats out, or export the ensemble again with another --repeats."
    )


def test_a_file_that_holds_its_draws_takes_none(exported):
    frames = {"rgb": np.zeros((1, 2, 7), np.uint8), "audio": np.zeros((1, 2, 3), np.uint8)}

    with pytest.raises(
        ValueError, match=r"^the file's draws are not an input; repeats and draws cannot be given$"
    ):
        OnnxEnsemble(exported.path).run(frames, np.array([2]), repeats=3)


# Draws made in the graph, and frames that are numbers


def test_each_run_draws_afresh_and_each_member_by_itself(drawing):
    session = OnnxEnsemble(drawing.path)
    frames, num_frames = arrays()
    numbers = {name: values.astype(np.float32) for name, values in frames.items()}

    first, second = (session.run(numbers, num_frames).probabilities for _ in range(2))

    assert np.abs(first - second).max() > 1e-4
    numbers = torch.cat([values.flatten() for draws in drawing.drawn for values in draws.values()])
    assert len(numbers.unique()) > 0.99 * len(numbers) > 250  # 24 bits: few are alike by chance
    assert [value.name for value in session.session.get_outputs()] == [*OUTPUTS]
    assert session.inputs == ("rgb", "audio", "num_frames")


def test_the_mean_of_many_runs_is_that_of_many_repeats(drawing, fused_pair):
    session = OnnxEnsemble(drawing.path)
    frames, num_frames = arrays()
    given = {k: dequantise(torch.from_numpy(v)).numpy() for k, v in frames.items()}

    runs = [session.run(given, num_frames).probabilities for _ in range(200)]

    with torch.inference_mode():
        expected = torch_of(fused_pair, 600)(*tensors(frames, num_frames)).numpy()
    # two means of 600 draws each: 6 standard errors of their difference
    allowed = 6 * np.std(runs, axis=0).max() * np.sqrt(2 / 200)
    np.testing.assert_allclose(np.mean(runs, axis=0), expected, rtol=0, atol=allowed)
    assert allowed < 0.1


def test_records_that_store_bytes_fit_a_file_that_takes_numbers(drawing, fused_pair):
    frames, num_frames = arrays()
    frames = {name: np.repeat(values[:, :1], 7, axis=1) for name, values in frames.items()}
    batch = Batch(tuple("abcd"), frames, num_frames, LabelLists.from_lists([[]] * 4))

    loaded = load(drawing.path)

    assert loaded.schema.interface == SCHEMA.interface
    np.testing.assert_allclose(  # of frames that are all alike, whatever is drawn
        loaded.probabilities(batch), load(fused_pair).probabilities(batch), rtol=0, atol=ORDER
    )


def test_verification_has_nothing_to_compare_fresh_draws_with(drawing):
    claims = {claim.name: (claim.verdict, claim.finding) for claim in verify(drawing.path)}

    assert claims["content"][0] == claims["weights"][0] == "holds"
    assert claims["parity"] == ("not checked", "its draws are fresh in each run")


# Weights in a second file


def test_the_weights_lie_beside_the_file_and_count(with_inputs, fused_pair):
    path = with_inputs.path
    beside = path.with_name(f"input.onnx.{sha256_of(fused_pair)[:12]}.data")

    assert files_of(path) == [path, beside]
    assert with_inputs.num_bytes == path.stat().st_size + beside.stat().st_size
    weights = [each for each in read_tensors(path) if each.name.startswith("member_")]
    assert len(weights) > 20
    assert {each.location for each in weights} == {beside.name}
    assert read_metadata(path).weights_file.model_dump() == {
        "path": beside.name, "sha256": sha256_of(beside)
    }  # fmt: skip


def test_a_changed_byte_of_the_weights_is_seen(with_inputs, fused_pair, tmp_path):
    path, beside = (Path(shutil.copy(each, tmp_path)) for each in files_of(with_inputs.path))
    whole = {claim.name: claim.verdict for claim in verify(path, fused=fused_pair)}
    content = bytearray(beside.read_bytes())
    content[0] ^= 1
    beside.write_bytes(content)

    claims = {claim.name: (claim.verdict, claim.finding) for claim in verify(path)}

    assert {name for name, verdict in whole.items() if verdict == "holds"} == {
        "content", "bytes", "weights", "parity", "products"
    }  # fmt: skip
    assert claims["content"] == (
        "fails", f"the SHA-256 of {beside.name} is not the one it names"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "disabled"), [(None, ["ConstantFolding"]), (False, None), (True, ["ConstantFolding"])]
)
def test_mapped_weights_are_not_folded_unless_asked(asked, disabled, with_inputs, monkeypatch):
    opened = []
    session = OnnxEnsemble(with_inputs.path).session
    monkeypatch.setattr(
        "onnxruntime.InferenceSession", lambda *_, **options: opened.append(options) or session
    )

    OnnxEnsemble(with_inputs.path, low_memory=asked)

    assert [options["disabled_optimizers"] for options in opened] == [disabled]


@pytest.mark.parametrize("keep_memory", [True, False])
def test_memory_is_kept_between_runs_unless_told_and_planned_for_no_shape(keep_memory, with_inputs):
    ensemble = OnnxEnsemble(with_inputs.path, keep_memory=keep_memory)

    options = ensemble.session.get_session_options()
    assert options.enable_cpu_mem_arena == keep_memory
    assert not options.enable_mem_pattern


@pytest.fixture
def again(built, fused, tmp_path, monkeypatch):
    """Export the members of the workspace without tracing them again."""
    monkeypatch.setattr(export, "build_graph", lambda *_, **__: built)
    return lambda **options: export_onnx(
        fused["bf16"].path, tmp_path / "e.onnx", repeats=REPEATS, **options
    )


def test_a_replaced_file_takes_its_weights_with_it(again, tmp_path):
    stale, other = tmp_path / "e.onnx.0123456789ab.data", tmp_path / "e.onnx.data"
    stale.write_bytes(OLD)
    other.write_bytes(OLD)
    (tmp_path / "e.onnx").write_bytes(OLD)

    mapped = again(low_memory=True, force=True)

    files = files_of(mapped.path)
    assert sorted(tmp_path.iterdir()) == sorted([*files, other, tmp_path / "README.md"])
    again(force=True)
    assert sorted(tmp_path.iterdir()) == sorted([mapped.path, other, tmp_path / "README.md"])
    assert files_of(mapped.path) == [mapped.path]


def test_of_a_failed_export_no_weights_are_left(again, tmp_path):
    with pytest.raises(SizeLimitError) as caught:
        again(low_memory=True, max_size=800 * 2**10)

    assert "over the limit of 800.0 KiB" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_one_file_may_lie_beside_it(exported, with_inputs, tmp_path):
    whole = exported.num_bytes
    mapped = with_inputs.path.stat().st_size
    limit = export._Limit(MAX_SIZE, fused_bytes=whole, selection=None, largest_file=whole - 1)
    at_limit = limit._replace(largest_file=mapped)

    with pytest.raises(ExportError) as caught:
        limit.refuse(exported.path, tmp_path / "e.onnx", read_metadata(exported.path))
    kept = at_limit.refuse(with_inputs.path, with_inputs.path, read_metadata(with_inputs.path))

    assert str(caught.value) == (
        f"{tmp_path / 'e.onnx'} would have {whole:,} bytes; ONNX Runtime reads at most "
        f"{whole - 1:,} from one file.\n"
        "Export with --low-memory, or fuse again with --dtype int8 or --dtype int4."
    )
    assert kept > mapped  # with the weights beside it


def test_an_export_reads_the_fields_of_its_file_once_and_hashes_it_once(
    again, tmp_path, monkeypatch
):
    hashed, read = [], []

    def note_hash(path):
        hashed.append(path.name)
        return sha256_of(path)

    def note_opening(path):
        read.append(path.suffix)
        return opened(path)

    for module in ("export.stage", "serving.model_card"):
        monkeypatch.setattr(f"ensemble_kit.{module}.sha256_of", note_hash)
    monkeypatch.setattr("ensemble_kit.serving.onnx_file.opened", note_opening)

    again(triton=tmp_path / "models")

    assert hashed.count("e.onnx") == 1
    assert read == [".part"]  # its tensors; what it says of itself is in hand


def test_a_repository_has_the_weights_too_and_is_refused_before_any_work(again, tmp_path):
    again(low_memory=True, triton=tmp_path / "models")

    beside = files_of(tmp_path / "e.onnx")[1]
    version = tmp_path / "models" / "e" / "1"
    assert sorted(each.name for each in version.iterdir()) == sorted(["model.onnx", beside.name])
    assert OnnxEnsemble(version / "model.onnx").inputs[0] == "rgb"
    (tmp_path / "e.onnx").unlink()
    with pytest.raises(OutputError) as caught:
        again(triton=tmp_path / "models")
    assert str(caught.value) == (
        f"{version.parent / 'config.pbtxt'} exists already.\n"
        "Name another output, or replace it with --force."
    )
    assert not (tmp_path / "e.onnx").exists()


def test_a_disk_that_fills_while_the_repository_is_written_leaves_nothing(
    again, tmp_path, monkeypatch
):
    def fill(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(OutputError) as caught:
        again(low_memory=True, triton=tmp_path / "models")

    assert str(caught.value) == (
        f"{tmp_path}/models/e/1/model.onnx cannot be written: No space left on device.\n"
        "Free some space or name another folder; nothing was left half-written."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", ["README.md", "models/e/config.pbtxt", "models/e"])
def test_an_export_that_was_killed_between_its_files_goes_on(again, lacking, tmp_path):
    again(triton=tmp_path / "models")
    whole = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for path in (tmp_path / lacking, tmp_path / "README.md"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    triton = None if lacking == "README.md" else tmp_path / "models"

    again(triton=triton)

    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == whole


def test_another_export_that_lacks_a_file_is_not_replaced(again, tmp_path):
    path = again().path
    before = path.read_bytes()

    for options in ({"input_type": "float32"}, {"low_memory": True}):
        with pytest.raises(OutputError, match=r"e\.onnx exists already\."):
            again(triton=tmp_path / "models", **options)
    path.write_bytes(OLD)
    with pytest.raises(OutputError, match=r"e\.onnx exists already\."):
        again(triton=tmp_path / "models")

    assert sorted(each.name for each in tmp_path.iterdir()) == ["README.md", "e.onnx"]
    assert path.read_bytes() == OLD != before


def test_the_card_names_both_files(with_inputs):
    card = with_inputs.path.with_name("README.md").read_text()

    for path in files_of(with_inputs.path):
        assert f"`{path.name}`" in card
