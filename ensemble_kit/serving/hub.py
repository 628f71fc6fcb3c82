"""Exported files on the Hugging Face Hub, by names such as ``hf:user/name``.

``huggingface_hub`` is imported when a file is fetched or pushed, and not before: a server that has
its file on disk needs NumPy and ONNX Runtime alone. Nothing that comes from the Hub is unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os.path import exists, isfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ensemble_kit.choices import ON_HUB
from ensemble_kit.errors import EnsembleKitError, HubError
from ensemble_kit.files import sha256_of, written_aside
from ensemble_kit.progress import is_quiet
from ensemble_kit.serving.onnx_file import read_properties
from ensemble_kit.texts import parse_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

LISTING = "ensemble-kit.json"  # of a commit's files, beside those that were fetched
COMMIT = re.compile("[0-9a-f]{40}")
REFERENCE = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[\w.-]+\.onnx))?(@(?P<revision>[\w./-]+))?"
)


class Reference(NamedTuple):
    """An exported file on the Hub.

    Attributes:
        repo: The repository, ``user/name``.
        file: The file's name; None where the repository has only one.
        revision: A branch, a tag or a commit; None is the newest.
    """

    repo: str
    file: str | None
    revision: str | None

    def __str__(self) -> str:
        """Return the reference as it is written."""
        file = f"/{self.file}" if self.file else ""
        return f"{ON_HUB}{self.repo}{file}{f'@{self.revision}' if self.revision else ''}"


class FetchedFile(NamedTuple):
    """A file of the Hub that is on this machine.

    Attributes:
        path: The file, with its weights beside it if they are in a second one.
        reference: It and the commit that it is of.
    """

    path: Path
    reference: Reference


def parse_reference(text: str) -> Reference:
    """Read ``hf:user/name``, ``hf:user/name/file.onnx`` or one of these with ``@revision``.

    Raises:
        HubError: It is none of these.
    """
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise HubError(
            f"{text} names no file on the Hugging Face Hub.",
            hint="Write hf:user/name, hf:user/name/file.onnx or hf:user/name@revision.",
        )
    return Reference(match["repo"], match["file"], match["revision"])


def fetch(text: str) -> FetchedFile:
    """Bring an exported file of the Hub to this machine, unless it is here already.

    Files lie in ``ensemble-kit/`` of ``HF_HOME``, by repository and commit. A download that was
    stopped is continued. Every file is hashed and compared with what the Hub says of it, each time.
    A reference that names a whole commit needs no network once its files are here.

    Raises:
        HubError: The Hub cannot be reached, has no such file, or the file is not what it should be;
            or ``huggingface_hub`` is not installed.
    """
    reference = parse_reference(text)
    api = hub()
    with errors_named(text):
        commit = _commit(api, reference)
        folder = _folder(reference.repo, commit)
        hashes = _listing(api, reference.repo, commit, folder)
        reference = Reference(reference.repo, reference.file or _only_file(text, hashes), commit)
        path = _fetched(api, reference, folder, str(reference.file), hashes)
        beside = parse_json(read_properties(path).get("ensemble_kit.weights_file", "null"))
        if beside is not None:
            _fetched(api, reference, folder, beside["path"], hashes)
    return FetchedFile(path, reference)


def _commit(api: "HfApi", reference: Reference) -> str:
    if reference.revision is not None and COMMIT.fullmatch(reference.revision):
        return reference.revision
    return str(api.repo_info(reference.repo, revision=reference.revision).sha)


def _folder(repo: str, commit: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "ensemble-kit" / repo.replace("/", "--") / commit


def _listing(api: "HfApi", repo: str, commit: str, folder: Path) -> dict[str, str]:
    """Return the hashes of a commit's files, which never change, as the Hub gave them."""
    listing = folder / LISTING
    if isfile(listing):
        return dict(parse_json(listing.read_bytes()))
    entries = api.list_repo_tree(repo, revision=commit)
    hashes = {each.path: hash_of_entry(each) for each in entries if hasattr(each, "blob_id")}
    with written_aside(listing, force=True) as aside:
        aside.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    return hashes


def _only_file(text: str, hashes: Mapping[str, str]) -> str:
    names = sorted(name for name in hashes if name.endswith(".onnx"))
    if len(names) != 1:
        found = ", ".join(names[:5]) or "none"
        raise HubError(
            f"{text} has {len(names)} ONNX files, not one: {found}.",
            hint="Name one of them, as in hf:user/name/file.onnx.",
        )
    return names[0]


def _fetched(
    api: "HfApi", reference: Reference, folder: Path, name: str, hashes: Mapping[str, str]
) -> Path:
    """Return a file on this machine that has the hash which the Hub gave."""
    if name not in hashes:  # which also refuses a name that would lead out of the folder
        raise HubError(f"{reference} has no file {name}.", hint="Name a file that is there.")
    path = folder / name
    if not exists(path):
        api.hf_hub_download(reference.repo, name, revision=reference.revision, local_dir=folder)
    if not has_hash(path, hashes[name]):
        path.unlink()
        raise HubError(
            f"{name} of {reference} is not what the Hub says: its hash differs.",
            hint="Run this again; the damaged copy was removed, and is fetched again.",
        )
    return path


def hash_of_entry(entry: "RepoFile") -> str:
    """Return the hash that the Hub has of a file: SHA-256 of a large one, or git's own."""
    return entry.lfs.sha256 if entry.lfs is not None else str(entry.blob_id)


def has_hash(content: Path | bytes, expected: str) -> bool:
    """Return whether a file, or what it would hold, has a hash of ``hash_of_entry``."""
    if isinstance(content, Path) and len(expected) == 64:
        return sha256_of(content) == expected
    whole = content.read_bytes() if isinstance(content, Path) else content
    if len(expected) == 64:
        return hashlib.sha256(whole).hexdigest() == expected
    git = hashlib.sha1(b"blob %d\0" % len(whole) + whole, usedforsecurity=False)
    return git.hexdigest() == expected


def hub() -> "HfApi":
    """Return the Hub, as the environment and the saved token say.

    Raises:
        HubError: ``huggingface_hub`` is not installed.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars
    except ImportError as error:
        raise HubError(
            "huggingface_hub is not installed.", hint="Run `pip install 'ensemble-kit[hub]'`."
        ) from error
    if is_quiet():
        disable_progress_bars()
    return HfApi(library_name="ensemble-kit")


@contextmanager
def errors_named(reference: object) -> Iterator[None]:
    """Raise what goes wrong on the way to the Hub as ``HubError``."""
    try:
        yield
    except EnsembleKitError:
        raise
    except Exception as error:  # of HTTP, of the network and of the library, without a common class
        reasons = [" ".join(str(each).split()) for each in (error, error.__cause__) if each]
        raise HubError(
            f"{reference}: {': '.join(filter(None, reasons)).rstrip('.') or type(error).__name__}.",
            hint="Check the name and the network; `hf auth login` gives access to what is private.",
        ) from error
