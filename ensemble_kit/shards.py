"""Predictions of many files of records, a file each: resumed and shared out.

Whole files are skipped, so the same command resumes after a stop, and many machines can share one
folder: each predicts the shards that fall to it by their names.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import exists
from pathlib import Path
from typing import NamedTuple

from ensemble_kit.choices import BATCH_SIZE, DEVICE, AnyPath, Dtype
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.remote import ahead, is_url, origin_of
from ensemble_kit.errors import InputError, OutputError
from ensemble_kit.inference import add_predictions, load_for
from ensemble_kit.predictions.file import read_own
from ensemble_kit.predictions.folder import SUFFIX, differing, list_files
from ensemble_kit.predictions.writing import predictions_written
from ensemble_kit.progress import progress
from ensemble_kit.store.provenance import ModelMetadata, ShardMetadata, schema_sha256


class Share(NamedTuple):
    """A part of the shards: those whose names fall to it, whatever other shards there are.

    Attributes:
        number: Which part, counted from 1.
        parts: How many parts there are.
    """

    number: int
    parts: int

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read ``2/8``, the second of eight parts.

        Raises:
            InputError: The text is something else.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(
                f"{text!r} is no share of the shards.",
                hint="Write --shard 1/8 for the first of eight, up to --shard 8/8.",
            )
        return cls(int(match[1]), int(match[2]))

    def has(self, name: str) -> bool:
        """Return whether a shard falls to this part."""
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).digest()
        return int.from_bytes(digest[:8], "big") % self.parts == self.number - 1


@dataclass(frozen=True)
class Shard:
    """A file of records, and where its predictions are written.

    Attributes:
        name: Its file name.
        place: The path or URL that names it.
        path: Where it is read, which for a URL is its place in the cache.
        output: The predictions file.
    """

    name: str
    place: str
    path: Path
    output: Path


@dataclass(frozen=True)
class PredictedShards:
    """What a call of ``predict_shards`` has done.

    Attributes:
        folder: The folder.
        num_predicted: Shards that were predicted.
        num_skipped: Shards whose predictions were there already.
    """

    folder: Path
    num_predicted: int
    num_skipped: int


def find_shards(records: Records, folder: Path) -> list[Shard]:
    """Return the files of some records, by name.

    Raises:
        OutputError: Two files would have the same output.
    """
    shards: dict[Path, Shard] = {}
    for path in records.paths:
        origin = origin_of(path)
        place = str(path) if origin is None else origin.url
        name = place.replace("\\", "/").rpartition("/")[2]
        output = folder / f"{Path(name).stem}{SUFFIX}"
        if output in shards:
            raise OutputError(
                f"{shards[output].place} and {place} would both be written to {output}.",
                hint="Give them a folder each, or rename one.",
            )
        shards[output] = Shard(name, place, path, output)
    return sorted(shards.values(), key=lambda shard: shard.name)


def shared_out(shards: Sequence[Shard], count: int) -> list[list[Shard]]:
    """Return the shards in at most ``count`` parts of about as many bytes each, none empty."""
    parts: list[list[Shard]] = [[] for _ in range(count)]
    sizes = [0] * count
    for shard in sorted(shards, key=_size, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(shard)
        sizes[smallest] += _size(shard)
    return [sorted(part, key=lambda shard: shard.name) for part in parts if part]


def _size(shard: Shard) -> int:
    origin = origin_of(shard.path)
    return shard.path.stat().st_size if origin is None else origin.num_bytes


def predict_shards(
    model: AnyPath,
    records: Records,
    folder: AnyPath,
    *,
    share: Share | None = None,
    repeats: int | None = None,
    batch_size: int = BATCH_SIZE,
    top_k: int | None = None,
    dtype: Dtype | None = None,
    device: str = DEVICE,
    force: bool = False,
) -> PredictedShards:
    """Write the probabilities of a model on some records, a file for each file of records.

    A shard whose predictions are there already is skipped, if they are what this call would make.

    Args:
        model: A checkpoint, a foreign model, a fused file or an ONNX file.
        records: The videos to tag. They need no labels.
        folder: The folder of the predictions files.
        share: The part of the shards to predict; None takes all.
        repeats: Test-time draws to average; None means 1, or for an ONNX file the number it was
            exported with.
        batch_size: Videos at a time; it changes memory and speed only.
        top_k: How many classes of each video to keep; None keeps all.
        dtype: See ``predict``.
        device: ``cpu`` or ``cuda``.
        force: Whether predictions that are there are made again and replaced.

    Raises:
        OutputError: Predictions that are there were made otherwise, and ``force`` is False; or two
            shards have the same name.
        PredictionsError: The records do not have the model's modalities or vocabulary.
        CheckpointError: The model or a predictions file that is there is damaged.
    """
    model, folder = Path(model), Path(folder)
    everything = find_shards(records, folder)
    shards = [shard for shard in everything if share is None or share.has(shard.name)]
    list_files(folder, [shard.output.name for shard in everything])
    if not shards:
        return PredictedShards(folder, 0, 0)
    loaded, by = load_for(records, model, folder, dtype=dtype, repeats=repeats, device=device)
    kept = None if top_k is None or top_k >= loaded.schema.num_classes else top_k
    for shard in [] if force else shards:
        _refuse_other(shard, records, by, kept)
    waiting = {shard.path: shard for shard in shards if force or not exists(shard.output)}
    with progress(f"predict {loaded.name}", len(waiting)) as shown:
        for done, path in enumerate(ahead(tuple(waiting)), start=1):
            with predictions_written(
                waiting[path].output,
                label_names=loaded.schema.names,
                name=loaded.name,
                model=by,
                top_k=kept,
                shard=_metadata(waiting[path], records),
                force=force,
            ) as writer:
                for _ in add_predictions(
                    loaded, records.alone(path), writer, batch_size=batch_size
                ):
                    pass
            shown.update(done, waiting[path].name)
    return PredictedShards(folder, len(waiting), len(shards) - len(waiting))


def _metadata(shard: Shard, records: Records) -> ShardMetadata:
    (fingerprint,) = records.alone(shard.path).fingerprints()
    return ShardMetadata(
        name=shard.name,
        url=shard.place if is_url(shard.place) else None,
        content=fingerprint.content,
        schema_sha256=schema_sha256(records.schema),
        skips_bad_records=records.skips_bad_records,
    )


def _refuse_other(shard: Shard, records: Records, by: ModelMetadata, top_k: int | None) -> None:
    """Raise ``OutputError`` if a shard's predictions are there and were made otherwise."""
    if not exists(shard.output):
        return
    metadata = read_own(shard.output).metadata
    assert metadata is not None
    was, now = metadata.shard, _metadata(shard, records)
    made_by = metadata.model
    difference = differing(
        (
            ("by another model", made_by and made_by.file.sha256, by.file.sha256),
            ("with other repeats", made_by and made_by.repeats, by.repeats),
            ("in another precision", made_by and made_by.dtype, by.dtype),
            ("with another --top-k", metadata.top_k, top_k),
            ("from another file than this", was and was.name, now.name),
            ("from other records", was and was.content, now.content),
            ("by another schema", was and was.schema_sha256, now.schema_sha256),
            ("with another --skip-bad-records", was and was.skips_bad_records,
             now.skips_bad_records),
        )
    )  # fmt: skip
    if difference is not None:
        raise OutputError(
            f"{shard.output} exists already, and was made {difference}.",
            hint=f"Name another folder, or predict {shard.place} again with --force.",
        )
