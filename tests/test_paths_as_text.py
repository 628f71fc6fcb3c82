"""Every public function takes text, and any ``os.PathLike``, where it takes a path."""

import ast
from pathlib import Path

import numpy as np
import pytest

import ensemble_kit as kit
from ensemble_kit.data.schema import read_schema, write_schema
from ensemble_kit.data.synthetic import synthesize
from ensemble_kit.errors import CheckpointError, PredictionsError, RecordError
from ensemble_kit.inference import evaluate_model
from ensemble_kit.report.page import write_report
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.shards import predict_shards
from ensemble_kit.store.workspace import RunFolder
from ensemble_kit.verification import verify

PACKAGE = Path(kit.__file__).parent
RAISING = {"exists", "is_dir", "is_file"}


class Named:
    """A path of another library."""

    def __init__(self, path):
        self.path = path

    def __fspath__(self):
        return self.path


def test_text_and_other_libraries_paths_stand_for_paths(own_workspace):
    records = kit.Records([Named("data/validate/*.tfrecord")], schema="data/schema.toml")
    recipe = kit.load_recipe(Named("recipes/mean.toml"))
    checkpoints = list(map(str, RunFolder(Path("runs/mean")).checkpoint_paths()))

    plan = kit.RunPlan(recipe=recipe, training=records, folder=Named("runs/again"))
    averaged = kit.average_checkpoints(
        checkpoints[-2:], "a.safetensors", batch_norm="last", even_if_worse=True
    )
    predictions = kit.predict("a.safetensors", records, "p.safetensors")
    shards = predict_shards(Named("a.safetensors"), records, Named("folder"))
    chosen = kit.select(["p.safetensors"], output="ensemble/s.json")
    fused = kit.fuse("ensemble/s.json", "f.safetensors")
    exported = kit.export_onnx("f.safetensors", "e.onnx", repeats=1, triton="served")
    page = write_report("ensemble/s.json", "report.html")

    assert plan.run.path == Path("runs/again")
    assert (averaged.path, predictions) == (Path("a.safetensors"), Path("p.safetensors"))
    assert (fused.path, exported.path, page) == tuple(
        map(Path, ("f.safetensors", "e.onnx", "report.html"))
    )
    assert Path("served").is_dir()
    assert shards
    assert len(chosen.members) == 1
    assert {claim.verdict for claim in verify("e.onnx", fused="f.safetensors")} <= {
        "holds", "not checked"
    }  # fmt: skip
    gap = evaluate_model(Named("f.safetensors"), records).gap
    assert gap == kit.load("f.safetensors").measure(records).gap
    assert OnnxEnsemble(Named("e.onnx")).metadata["repeats"] == "1"


@pytest.mark.parametrize("kind", [str, Named])
def test_so_they_do_for_data(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("v0.npy", np.ones((2, 3), np.float32))
    Path("labels.csv").write_text("VideoId,Labels\nv0,1\n")
    Path("names.txt").write_text("cat\ndog\n")

    converted = kit.convert(kind("v0.npy"), kind("labels.csv"), kind("own"), split={"all": 1})
    written = synthesize(
        kind("made"), num_videos={"test": 1}, modalities={"rgb": 2}, num_classes=3, frames=(1, 2)
    )
    named = read_schema(kind("own/schema.toml")).with_label_names(kind("names.txt"))
    write_schema(named, kind("s.toml"), force=False)

    assert converted.folder == Path("own")
    assert read_schema("made/schema.toml") == written
    assert read_schema("s.toml").names == ("cat", "dog")
    assert len(list(kit.Records(kind("own/all/*.tfrecord")).videos())) == 1
    with pytest.raises(RecordError, match="no partition"):
        kit.download_youtube8m(kind("yt"), partition="x")


def test_one_path_is_not_taken_for_its_letters():
    for paths in ("no.safetensors", Named("no.safetensors")):
        with pytest.raises(CheckpointError) as caught:
            kit.average_checkpoints(paths, "a.safetensors")
        assert str(caught.value) == "no.safetensors does not exist.\nName a file that exists."
        with pytest.raises(PredictionsError) as caught:
            kit.select(paths, output="s.json")
        assert str(caught.value).startswith("no.safetensors cannot be read: No such file")


def test_what_lies_in_a_closed_folder_is_looked_at_with_os_path():
    """``Path.exists`` and its like raise ``PermissionError`` there; os.path's return False."""
    calls = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "recipes"  # packaged files, which are no Paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in RAISING
        and ast.unparse(node.func.value) != "os.path"
    ]

    assert calls == []
