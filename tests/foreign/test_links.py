import os

import onnx
import pytest
from builders import tiny_schema
from foreign_models import foreign_model

from ensemble_kit.foreign import import_onnx


def write_with_values_beside(folder):
    folder.mkdir(parents=True)
    onnx.save_model(
        foreign_model(),
        folder / "m.onnx",
        save_as_external_data=True,
        location="m.onnx_data",
        size_threshold=0,
    )


def linked_like_a_cache(folder):
    """As the Hugging Face Hub keeps files: under their hashes, with links by their names."""
    write_with_values_beside(folder / "written")
    (folder / "blobs").mkdir()
    snapshot = folder / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name, blob in (("m.onnx", "aa"), ("m.onnx_data", "bb")):
        (folder / "written" / name).rename(folder / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    return snapshot / "m.onnx"


def with_two_names(folder):
    write_with_values_beside(folder / "written")
    for name in ("m.onnx", "m.onnx_data"):
        os.link(folder / "written" / name, folder / name)
    return folder / "m.onnx"


def linked_alone(folder):
    """A link to the model in a folder without its values, which lie beside the model itself."""
    write_with_values_beside(folder / "written")
    (folder / "m.onnx").symlink_to("written/m.onnx")
    return folder / "m.onnx"


@pytest.mark.parametrize("write", [linked_like_a_cache, with_two_names, linked_alone])
def test_a_model_whose_values_are_reached_by_links_is_imported(write, tmp_path, request):
    if write is not linked_alone:  # one of them in the child process of an import
        request.getfixturevalue("import_in_this_process")
    path = write(tmp_path)

    found = import_onnx(
        path,
        tmp_path / "out.safetensors",
        schema=tiny_schema(widths={"rgb": 7}, num_classes=6),
        name="linked",
        inputs={"rgb": "pixels"},
        num_frames="lengths",
        activation="sigmoid",
    )

    assert found.worst_difference == 0
