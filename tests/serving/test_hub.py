"""Exported files on the Hugging Face Hub, pushed to and fetched from a server on this machine."""

import builtins
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ensemble_kit.cli import main
from ensemble_kit.errors import ExportError, HubError, OutputError
from ensemble_kit.files import sha256_of
from ensemble_kit.runtime import OnnxEnsemble
from ensemble_kit.serving.hub import LISTING, Reference, fetch, parse_reference
from ensemble_kit.serving.metadata import read_metadata
from ensemble_kit.serving.pushing import push
from ensemble_kit.store.provenance import FileMetadata

TO = "hf:ada/video-tags"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the library's


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, which ``huggingface_hub`` takes for the Hub, with a home of its files."""
    pytest.importorskip("huggingface_hub")
    from hub_server import serving
    from huggingface_hub import constants

    with serving() as server:
        pages = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pages)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.setenv("HF_TOKEN", "a-token")
        yield server


@pytest.fixture
def file(exported, tmp_path):
    """An exported file with its card in a folder that the test may write into."""
    folder = tmp_path / "ensemble"
    folder.mkdir()
    for name in ("ensemble.onnx", "README.md"):
        if (source := exported.path.with_name(name)).exists():
            shutil.copy(source, folder)
    return folder / "ensemble.onnx"


def frames_of(ensemble):
    ports = [each for each in ensemble.session.get_inputs() if len(each.shape) == 3]
    return {port.name: np.ones((2, 5, port.shape[2]), np.uint8) for port in ports}


def test_a_file_that_was_pushed_opens_from_its_name_and_says_the_same(hub, file):
    pushed = push(TO, file, license="cc-by-4.0", datasets=["youtube8m"])

    ensemble = OnnxEnsemble(TO)

    assert ensemble.source == str(pushed) == f"{TO}/ensemble.onnx@{pushed.revision}"
    here = OnnxEnsemble(file)
    counts = np.array([5, 3])
    for ours, theirs in zip(here.run(frames_of(here), counts),
                            ensemble.run(frames_of(here), counts), strict=True):  # fmt: skip
        np.testing.assert_array_equal(ours, theirs)
    assert here.source == str(file)


def test_the_card_on_the_hub_has_licence_data_sets_and_the_files_own_gap(hub, file):
    from huggingface_hub import ModelCard

    local = file.with_name("README.md").read_bytes()

    push(TO, file, license="cc-by-4.0", datasets=["youtube8m", "audioset"])

    card = ModelCard(hub.repos["ada/video-tags"][-1][1]["README.md"].decode())
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", ["youtube8m", "audioset"])
    (result,) = card.data.eval_results
    claimed = json.loads(OnnxEnsemble(file).metadata["validation"])
    assert (result.metric_type, result.metric_value) == ("gap", claimed["score"])
    assert file.with_name("README.md").read_bytes() == local


def test_what_is_there_already_is_not_sent_again(hub, file):
    first = push(TO, file, license="cc-by-4.0")
    sent = len(hub.requests)

    again = push(TO, file, license="cc-by-4.0")

    assert again == first
    assert not [each for each in hub.requests[sent:] if "PUT" in each or "/commit/" in each]


def test_a_push_that_was_stopped_before_its_commit_sends_only_the_rest(hub, file, monkeypatch):
    from huggingface_hub import HfApi

    with monkeypatch.context() as patched:
        patched.setattr(HfApi, "create_commit", stopped_after_upload(HfApi.create_commit))
        with pytest.raises(KeyboardInterrupt):
            push(TO, file, license="cc-by-4.0")
    assert len(hub.repos["ada/video-tags"]) == 1  # nothing half-made is to be seen
    uploads = [each for each in hub.requests if each.startswith("PUT")]

    push(TO, file, license="cc-by-4.0")

    assert len(uploads) == 1
    assert [each for each in hub.requests if each.startswith("PUT")] == uploads


def stopped_after_upload(create_commit):
    def stopped(self, repo, operations, **options):
        self.preupload_lfs_files(repo, operations)
        raise KeyboardInterrupt

    return stopped


def test_another_file_of_that_name_is_replaced_only_by_force(hub, file):
    hub.commit("ada/video-tags", {"ensemble.onnx": b"another", "README.md": b"# mine"})

    with pytest.raises(OutputError) as caught:
        push(TO, file, license="cc-by-4.0")
    assert str(caught.value) == (
        "hf:ada/video-tags has another README.md and another ensemble.onnx.\n"
        "Name another repository, or replace what is there with --force."
    )
    assert len(hub.repos["ada/video-tags"]) == 1

    push(TO, file, license="cc-by-4.0", force=True)

    assert hub.repos["ada/video-tags"][-1][1]["ensemble.onnx"] == file.read_bytes()


def test_a_commit_that_is_here_opens_without_the_network(hub, file, monkeypatch):
    pushed = push(TO, file, license="cc-by-4.0")
    path, _ = fetch(str(pushed))
    asked = len(hub.requests)

    assert fetch(str(pushed)) == (path, pushed)
    assert len(hub.requests) == asked
    assert path.parent.name == pushed.revision

    newer = file.read_bytes() + b"\x32\x05newer"  # a doc string
    hub.commit("ada/video-tags", {"ensemble.onnx": newer})
    assert fetch(str(pushed)).path.read_bytes() == file.read_bytes()
    assert fetch(TO).path.read_bytes() == newer


def test_a_file_that_changed_on_disk_is_found_and_comes_again(hub, file):
    path, reference = fetch(str(push(TO, file, license="cc-by-4.0")))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    with pytest.raises(HubError) as caught:
        fetch(str(reference))

    assert str(caught.value) == (
        f"ensemble.onnx of {reference} is not what the Hub says: its hash differs.\n"
        "Run this again; the damaged copy was removed, and is fetched again."
    )
    assert fetch(str(reference)).path.read_bytes() == file.read_bytes()


def test_a_download_that_broke_off_is_continued(hub, file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500)  # what it keeps of
    reference = push(TO, file, license="cc-by-4.0")
    hub.cut = 1000

    path, _ = fetch(str(reference))

    assert path.read_bytes() == file.read_bytes()
    assert hub.cut is None
    assert any(each.endswith("/ensemble.onnx bytes=1000-") for each in hub.requests)


def test_weights_in_a_second_file_come_along(hub, file, monkeypatch):
    beside = file.with_name("ensemble.onnx.0123456789ab.data")
    beside.write_bytes(b"weights")
    monkeypatch.setattr(
        "ensemble_kit.serving.hub.read_properties",
        lambda _: {"ensemble_kit.weights_file": json.dumps({"path": beside.name, "sha256": ""})},
    )
    hub.commit("ada/two", {"ensemble.onnx": b"graph", beside.name: b"weights", "a.data": b"other"})

    path, _ = fetch("hf:ada/two")

    assert sorted(each.name for each in path.parent.iterdir() if each.is_file()) == sorted(
        ["ensemble.onnx", beside.name, LISTING]
    )


@pytest.mark.parametrize("name", ["../secret", "secret", "no.data"])
def test_a_file_cannot_have_another_one_sent_away(hub, file, monkeypatch, name):
    for folder in (file.parent, file.parent.parent):
        (folder / "secret").write_text("mine")
    metadata = read_metadata(file)
    beside = FileMetadata(path=name, sha256="0" * 64)
    monkeypatch.setattr(
        "ensemble_kit.serving.pushing.metadata_of",
        lambda *_: metadata.model_copy(update={"weights_file": beside}),
    )

    with pytest.raises(ExportError) as caught:
        push(TO, file, license="cc-by-4.0")

    assert str(caught.value) == (
        f"{file}: its weights, {name}, are not there as they were exported.\n"
        "Copy both files again, or export the file again."
    )
    assert hub.requests == []


def test_weights_in_a_second_file_are_pushed_too(hub, file, monkeypatch):
    (file.parent / "e.data").write_bytes(b"weights")
    metadata = read_metadata(file)
    beside = FileMetadata(path="e.data", sha256=sha256_of(file.parent / "e.data"))
    monkeypatch.setattr(
        "ensemble_kit.serving.pushing.metadata_of",
        lambda *_: metadata.model_copy(update={"weights_file": beside}),
    )

    push(TO, file, license="cc-by-4.0")

    assert hub.repos["ada/video-tags"][-1][1]["e.data"] == b"weights"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "no.data"])
def test_a_second_file_that_is_not_in_the_repository_is_refused(hub, monkeypatch, name):
    properties = {"ensemble_kit.weights_file": json.dumps({"path": name})}
    monkeypatch.setattr("ensemble_kit.serving.hub.read_properties", lambda _: properties)
    commit = hub.commit("ada/evil", {"ensemble.onnx": b"graph"})

    with pytest.raises(HubError) as caught:
        fetch("hf:ada/evil")

    assert str(caught.value) == (
        f"hf:ada/evil/ensemble.onnx@{commit} has no file {name}.\nName a file that is there."
    )


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("hf:ada/tags", Reference("ada/tags", None, None)),
        ("hf:ada/tags/a-b.onnx", Reference("ada/tags", "a-b.onnx", None)),
        ("hf:ada/tags@v1.0", Reference("ada/tags", None, "v1.0")),
        ("hf:ada/t_2.x/e.onnx@refs/pr/1", Reference("ada/t_2.x", "e.onnx", "refs/pr/1")),
    ],
)
def test_a_reference_reads_as_it_is_written(text, reference):
    assert parse_reference(text) == reference
    assert str(reference) == text


@pytest.mark.parametrize(
    "text", ["hf:ada", "hf:", "hf:ada/tags/x.txt", "hf:ada/tags/../x.onnx", "hf:a/b@", "ada/tags"]
)
def test_what_is_no_reference_is_refused(text):
    with pytest.raises(HubError) as caught:
        parse_reference(text)
    assert str(caught.value) == (
        f"{text} names no file on the Hugging Face Hub.\n"
        "Write hf:user/name, hf:user/name/file.onnx or hf:user/name@revision."
    )


def test_what_is_not_there_is_one_error(hub):
    hub.commit("ada/both", {"a.onnx": b"a", "b.onnx": b"b"})
    for text, said in (
        ("hf:ada/both", "hf:ada/both has 2 ONNX files, not one: a.onnx, b.onnx."),
        ("hf:ada/none", "404"),
        ("hf:ada/both@no-such", "404"),
        ("hf:ada/both/c.onnx", " has no file c.onnx."),
    ):
        with pytest.raises(HubError) as caught:
            fetch(text)
        assert said in caught.value.problem


def test_a_card_without_a_licence_or_with_another_gap_is_not_pushed(hub, file):
    with pytest.raises(HubError) as caught:
        push(TO, file)
    assert str(caught.value) == (
        f"The model card of {file} names no licence.\n"
        "Give one with --license, as the Hub names it: apache-2.0, cc-by-4.0, other."
    )
    card = file.with_name("README.md")
    gap = json.loads(OnnxEnsemble(file).metadata["validation"])["score"]
    text = card.read_text("utf-8")
    card.write_text(text.replace(f'"value": {gap}', '"value": 0.99'), encoding="utf-8")
    with pytest.raises(HubError) as caught:
        push(TO, file, license="cc-by-4.0")
    assert "says GAP@20 0.99; the file says" in caught.value.problem
    assert hub.repos == {}


def test_a_licence_that_the_hub_does_not_know_is_refused_before_anything_is_sent(hub, file):
    with pytest.raises(HubError) as caught:
        push(TO, file, license="mine")

    assert '"license" must be known' in caught.value.problem
    assert not [each for each in hub.requests if each.startswith("PUT")]


def test_the_library_that_is_missing_is_named(monkeypatch, file):
    whole = builtins.__import__

    def imported(name, *arguments, **options):
        if name.startswith("huggingface_hub"):
            raise ModuleNotFoundError(name)
        return whole(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", imported)
    for attempt in (lambda: OnnxEnsemble(TO), lambda: push(TO, file, license="x")):
        with pytest.raises(HubError) as caught:
            attempt()
        assert str(caught.value) == (
            "huggingface_hub is not installed.\nRun `pip install 'ensemble-kit[hub]'`."
        )


def test_commands_push_and_verify_by_name(hub, file, runner, monkeypatch):
    monkeypatch.chdir(file.parent.parent)
    result = runner.invoke(main, ["push", TO, "--license", "cc-by-4.0", "--quiet"])

    reference = f"{TO}/ensemble.onnx@{hub.repos['ada/video-tags'][-1][0]}"
    assert (result.exit_code, result.stdout) == (
        0,
        f'ensemble/ensemble.onnx: OnnxEnsemble("{reference}") opens it anywhere, pinned to this '
        "commit.\n",
    )

    result = runner.invoke(main, ["verify", TO, "--json"])

    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file"] == reference
    assert not Path("hf:ada").exists()
