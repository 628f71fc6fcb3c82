"""A workspace trained once for all tests that need files of the pipeline.

``conftest`` makes its fixtures known. Nothing may write into the shared workspace: a test that has
to takes ``own_workspace``, a copy.
"""

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

if TYPE_CHECKING:
    from ensemble_kit.export.graph import Graph
    from ensemble_kit.export.stage import ExportedFile
    from ensemble_kit.fusion.stage import FusedFile
    from ensemble_kit.networks.ensemble import FusedEnsemble

MEMBERS = {"mean": "average", "bag": "soft_bof", "vlad": "netvlad", "rnn": "gru"}
COEFFICIENTS = {"mean": 0.1, "bag": 0.4, "vlad": 0.3, "rnn": 0.2}
REPEATS = 3
HIDDEN = {"vlad": 600}  # its gating has 360,000 weights: a float32 copy would be seen in the size
NUM_VIDEOS = {"train": 48, "validate": 20, "test": 18}
TRAINING = ["--train", "data/train/*.tfrecord", "--validation", "data/validate/*.tfrecord"]


@dataclass(frozen=True)
class Workspace:
    """A folder with ``data``, ``recipes`` and ``runs``, and what training printed."""

    path: Path
    trained: Result

    def averaged(self, member: str) -> Path:
        return self.path / "runs" / member / "averaged.safetensors"


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Four members of the four poolings, trained for a few steps on two modalities."""
    from builders import tiny_recipe_text

    from ensemble_kit.cli import main
    from ensemble_kit.data.synthetic import synthesize

    root = tmp_path_factory.mktemp("workspace")
    synthesize(
        root / "data",
        num_videos=NUM_VIDEOS,
        modalities={"rgb": 7, "audio": 3},
        num_classes=6,
        frames=(2, 9),
        num_shards=3,
    )
    (root / "recipes").mkdir()
    for name, pooling in MEMBERS.items():
        text = tiny_recipe_text(
            pooling=pooling, learning_rate=0.02, max_steps=24, checkpoint_every=6, average_last=3
        )
        text = text.replace("size = 6\n", f"size = {HIDDEN.get(name, 6)}\n")
        (root / "recipes" / f"{name}.toml").write_text(text)
    recipes = [f"recipes/{name}.toml" for name in MEMBERS]
    with contextlib.chdir(root):
        trained = CliRunner().invoke(main, ["train", *recipes, *TRAINING, "--keep", "4"])
    assert trained.exit_code == 0, trained.output
    return Workspace(root, trained)


@pytest.fixture
def own_workspace(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Workspace:
    """A copy to write into, which is the current folder too: trained, with nothing selected."""
    ignored = shutil.ignore_patterns("ensemble")  # other tests' fixtures, if they came before
    shutil.copytree(workspace.path, tmp_path / "workspace", ignore=ignored)
    monkeypatch.chdir(tmp_path / "workspace")
    return Workspace(tmp_path / "workspace", workspace.trained)


@pytest.fixture
def own_ensemble(selection: Path, own_workspace: Workspace) -> Path:
    """The copy's folder of what is selected, with what other fixtures have fused and exported."""
    return Path(shutil.copytree(selection.parent, own_workspace.path / "ensemble"))


@pytest.fixture(scope="session")
def selection(workspace: Workspace) -> Path:
    """A selection of all four members, mixed unequally."""
    return write_selection_of(
        workspace.path / "ensemble" / "selection.json",
        {name: workspace.averaged(name) for name in MEMBERS},
        COEFFICIENTS,
    )


@pytest.fixture(scope="session")
def fused(selection: Path) -> "dict[str, FusedFile]":
    """The selection fused in each type, by the type's name."""
    from ensemble_kit.fusion.stage import fuse

    folder = selection.parent
    return {
        dtype: fuse(selection, folder / f"{dtype}.safetensors", dtype=dtype)
        for dtype in ("fp32", "fp16", "bf16", "int8", "int4")
    }


@pytest.fixture(scope="session")
def built(fused: "dict[str, FusedFile]") -> "Graph":
    """The graph of the four members in bf16, which takes seconds to trace."""
    from ensemble_kit.export.graph import build_graph
    from ensemble_kit.store.provenance import FusedMetadata
    from ensemble_kit.store.tensor_files import open_tensors

    with open_tensors(fused["bf16"].path) as file:
        return build_graph(file, file.metadata_as(FusedMetadata), repeats=REPEATS)


@pytest.fixture(scope="session")
def exported(fused: "dict[str, FusedFile]", built: "Graph") -> "ExportedFile":
    """The four members in bf16 as one ONNX file that averages REPEATS draws."""
    from ensemble_kit.export import stage as export

    path = fused["bf16"].path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "build_graph", lambda *_, **__: built)
        return export.export_onnx(path, path.with_name("ensemble.onnx"), repeats=REPEATS)


@pytest.fixture(scope="session")
def exported_int4(fused: "dict[str, FusedFile]") -> "ExportedFile":
    """The four members in int4 as one ONNX file that averages REPEATS draws."""
    from ensemble_kit.export.stage import export_onnx

    path = fused["int4"].path
    return export_onnx(path, path.with_name("int4.onnx"), repeats=REPEATS)


@pytest.fixture(scope="session")
def ensemble(fused: "dict[str, FusedFile]") -> "FusedEnsemble":
    """What ``exported`` was made from, in PyTorch, with the same draws."""
    from ensemble_kit.networks.loading import load_fused
    from ensemble_kit.store.tensor_files import open_tensors

    with open_tensors(fused["bf16"].path) as file:
        return load_fused(file, repeats=REPEATS)


def write_selection_of(
    path: Path,
    checkpoints: Mapping[str, Path],
    coefficients: Mapping[str, float],
    *,
    frontier: Mapping[tuple[str, ...], float] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Path:
    """Write a selection of checkpoints as if `ensemble-kit select` had chosen them.

    Its GAP is 0.75. ``frontier`` says which ensembles were measured beside it, and their GAPs;
    ``dtypes`` in which precision some members were selected that are not in bf16.
    """
    from ensemble_kit.networks.fused_member import model_metadata
    from ensemble_kit.store.provenance import FileMetadata
    from ensemble_kit.store.selection_file import (
        BootstrapMetadata,
        FrontierMetadata,
        SearchMetadata,
        SelectedMetadata,
        SelectionMetadata,
        write_selection,
    )
    from ensemble_kit.store.tensor_files import open_tensors

    members = []
    for name, checkpoint in checkpoints.items():
        with open_tensors(checkpoint) as file:
            model = model_metadata(file, path.parent, repeats=1)
        dtype = (dtypes or {}).get(name, "bf16")
        model = model.model_copy(update={"dtype": dtype})
        members.append(
            SelectedMetadata(
                name=name,
                dtype=dtype,
                coefficient=coefficients[name],
                bytes=model.bytes_by_dtype[dtype],
                score=0.25,
                score_without=0.5,
                predictions=FileMetadata(path="none.safetensors", sha256="0" * 64),
                model=model,
            )
        )
    metadata = SelectionMetadata(
        kit_version="0.0",
        metric="gap",
        k=20,
        dtypes=("bf16",),
        max_size=2**30,
        mixing="uniform",
        rule="Made up.",
        search=SearchMetadata(
            strategy="greedy",
            criterion="gain",
            max_members=None,
            beam_width=None,
            start=(),
            excluded=(),
            evaluations=0,
            greedy_score=None,
        ),
        dataset_sha256="0" * 64,
        vocabulary_sha256=None,
        labels=None,
        videos=1,
        positives=1,
        score=0.75,
        bytes=model.shared_bytes + sum(member.bytes for member in members),
        shared_bytes=model.shared_bytes,
        members=tuple(members),
        path=(),
        frontier=tuple(
            FrontierMetadata(
                members=names,
                dtypes=tuple((dtypes or {}).get(name, "bf16") for name in names),
                score=gap,
                confirmed_score=None,
                bytes=model.shared_bytes
                + sum(member.bytes for member in members if member.name in names),
            )
            for names, gap in (frontier or {}).items()
        ),
        frontiers={},
        candidates=(),
        confirm=None,
        bootstrap=BootstrapMetadata(resamples=0, level=0.95, seed=0),
        optimised=None,
        truncation=None,
    )
    write_selection(path, metadata, force=False)
    return path
