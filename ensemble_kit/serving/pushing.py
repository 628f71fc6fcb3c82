"""An exported file, its weights and its model card, put on the Hugging Face Hub."""

from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ensemble_kit.choices import AnyPath
from ensemble_kit.errors import ExportError, HubError, OutputError
from ensemble_kit.files import sha256_of
from ensemble_kit.serving.calibration import Calibration
from ensemble_kit.serving.hub import (
    Reference,
    errors_named,
    has_hash,
    hash_of_entry,
    hub,
    parse_reference,
)
from ensemble_kit.serving.metadata import metadata_of
from ensemble_kit.serving.model_card import CARD, model_card
from ensemble_kit.serving.onnx_file import read_properties
from ensemble_kit.serving.session import without_prefix
from ensemble_kit.store.provenance import OnnxMetadata
from ensemble_kit.texts import read_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelCard

CORRECT = "Correct the card, or remove it: then one is made."


def push(
    to: str,
    path: AnyPath,
    *,
    license: str | None = None,  # noqa: A002 - as model cards call it
    datasets: Sequence[str] = (),
    private: bool = False,
    force: bool = False,
) -> Reference:
    """Put an exported file on the Hub, in one commit with its weights and its model card.

    What the repository has already with the same hash is not sent again, so that the same call
    continues one that was stopped. At the end the hashes of all files are asked for and compared.

    Args:
        to: The repository, ``hf:user/name``; it is made where there is none.
        path: The ``.onnx`` file. The ``README.md`` beside it is its card; without one, a card is
            made.
        license: The licence, as the Hub names it, such as ``cc-by-4.0``; None leaves the card's.
        datasets: Data sets that it was trained on, as the Hub names them; none leaves the card's.
        private: Whether a repository that is made is private.
        force: Whether files of the repository that differ may be replaced.

    Returns:
        The file with the commit that it is now of.

    Raises:
        ExportError: ``path`` is no whole ONNX file, or its weights are not those of its export.
        HubError: The Hub cannot be reached or refuses, the card names no licence or is not as the
            Hub reads cards, or ``huggingface_hub`` is not installed.
        OutputError: The repository has other files of these names, and ``force`` is False.
        ProviderError: Another tool wrote the file, or its calibration is damaged.
    """
    path, target = Path(path), parse_reference(to)
    if target.file is not None or target.revision is not None:
        raise HubError(f"{to} names more than a repository.", hint="Write hf:user/name.")
    properties = without_prefix(read_properties(path))
    metadata = metadata_of(properties, path)
    weights = _weights(path, metadata)
    calibration = Calibration.of(properties, path)
    card = checked_card(
        _card(path, metadata, calibration, license, datasets), metadata, name=str(path)
    )
    api = hub()
    contents: dict[str, Path | bytes] = {path.name: path, **weights}
    contents[CARD] = str(card).encode()
    with errors_named(to):
        api.create_repo(target.repo, private=private, exist_ok=True)
        head = str(api.repo_info(target.repo).sha)
        there = _hashes(api, target.repo, head, contents)
        new = {name: contents[name] for name in _others(contents, there)}
        _refuse_others(target, there.keys() & new.keys(), force=force)
        commit = _commit(api, target.repo, new, parent=head) if new else head
        for name in _others(contents, _hashes(api, target.repo, commit, contents)):
            raise HubError(
                f"{name} of {to} has another hash than the file that was sent.",
                hint="Run this again with --force.",
            )
    return Reference(target.repo, path.name, commit)


def checked_card(card: "ModelCard", metadata: OnnxMetadata, *, name: str) -> "ModelCard":
    """Return a card of which the Hub can read the licence, and the score of the file it belongs to.

    Raises:
        HubError: It names no licence, or other results than the file's.
    """
    if not card.data.license:
        raise HubError(
            f"The model card of {name} names no licence.",
            hint="Give one with --license, as the Hub names it: apache-2.0, cc-by-4.0, other.",
        )
    results = {each.metric_name: each.metric_value for each in card.data.eval_results or ()}
    validation = metadata.validation
    if validation is not None:
        metric, score = validation.metric_name, validation.score
        if results.get(metric, score) != score:
            raise HubError(
                f"The model card of {name} says {metric} {results[metric]}; the file says {score}.",
                hint=CORRECT,
            )
    return card


def _card(
    path: Path,
    metadata: OnnxMetadata,
    calibration: Calibration | None,
    license_name: str | None,
    datasets: Sequence[str],
) -> "ModelCard":
    hub()  # which says what to install
    from huggingface_hub import ModelCard

    beside = path.with_name(CARD)
    is_there = isfile(beside)
    text = (
        read_text(beside, HubError, hint=CORRECT)
        if is_there
        else model_card(path, metadata, calibration)
    )
    with errors_named(beside):
        card = ModelCard(text)
    if license_name is not None:
        card.data.license = license_name
    if datasets:
        card.data.datasets = list(datasets)
    return card


def _weights(path: Path, metadata: OnnxMetadata) -> dict[str, Path]:
    """Return the second file, if there is one: what was exported with the first and nothing else.

    A file that another has made could name any file here, and so have it sent away.
    """
    beside = metadata.weights_file
    if beside is None:
        return {}
    file = path.parent / beside.path
    is_plain = Path(beside.path).name == beside.path
    if not is_plain or not isfile(file) or sha256_of(file) != beside.sha256:
        raise ExportError(
            f"{path}: its weights, {beside.path}, are not there as they were exported.",
            hint="Copy both files again, or export the file again.",
        )
    return {beside.path: file}


def _hashes(api: "HfApi", repo: str, commit: str, names: Mapping[str, Any]) -> dict[str, str]:
    found = api.get_paths_info(repo, list(names), revision=commit)
    return {each.path: hash_of_entry(each) for each in found if hasattr(each, "blob_id")}


def _others(contents: Mapping[str, Path | bytes], hashes: Mapping[str, str]) -> list[str]:
    """Return the names of what has no hash, or another one."""
    return [
        name
        for name, content in contents.items()
        if name not in hashes or not has_hash(content, hashes[name])
    ]


def _refuse_others(target: Reference, names: set[str], *, force: bool) -> None:
    if names and not force:
        raise OutputError(
            f"{target} has another {' and another '.join(sorted(names))}.",
            hint="Name another repository, or replace what is there with --force.",
        )


def _commit(api: "HfApi", repo: str, contents: Mapping[str, Path | bytes], *, parent: str) -> str:
    from huggingface_hub import CommitOperationAdd

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in contents.items()
    ]
    names = ", ".join(contents)
    made = api.create_commit(repo, operations, commit_message=f"Add {names}", parent_commit=parent)
    return str(made.oid)
