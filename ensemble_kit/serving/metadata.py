"""What an ONNX file says of itself, as properties."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from ensemble_kit.errors import ExportError
from ensemble_kit.serving.onnx_file import read_properties
from ensemble_kit.serving.session import METADATA_PREFIX, no_metadata, without_prefix
from ensemble_kit.store.provenance import OnnxMetadata, ProofMetadata
from ensemble_kit.validation import complaints

TEXTS = frozenset({"kit_version", "draw_source", "fused_sha256"})  # all others are JSON


def properties_of(metadata: OnnxMetadata) -> dict[str, str]:
    """Return metadata as the properties of a model; what is not proved yet is left out."""
    return {
        METADATA_PREFIX + key: value if key in TEXTS else json.dumps(value)
        for key, value in metadata.model_dump(mode="json").items()
        if key != "proof" or value is not None
    }


def proof_property(proof: ProofMetadata) -> dict[str, str]:
    """Return the property that is added when a file is proved."""
    return {f"{METADATA_PREFIX}proof": proof.model_dump_json()}


def read_metadata(path: Path) -> OnnxMetadata:
    """Return what an ONNX file says of itself; its weights are not read.

    Raises:
        ExportError: It is no whole ONNX file, or its properties are damaged.
        ProviderError: Another tool wrote it.
    """
    return metadata_of(without_prefix(read_properties(path)), path)


def metadata_of(properties: Mapping[str, str], path: Path) -> OnnxMetadata:
    """Return the metadata in a model's properties, whose names have lost the kit's prefix.

    Raises:
        ExportError: It is damaged; the error names ``path``.
        ProviderError: There is none.
    """
    found = {key: properties[key] for key in OnnxMetadata.model_fields if key in properties}
    if not found:
        raise no_metadata(path)
    try:
        values = ", ".join(
            f"{json.dumps(key)}: {json.dumps(text) if key in TEXTS else text}"
            for key, text in found.items()
        )
        return OnnxMetadata.model_validate_json(f"{{{values}}}", strict=True)
    except ValidationError as error:
        first = complaints(error, OnnxMetadata, owner="its metadata")[0]
        raise ExportError(
            f"{path}: its metadata is damaged: {first.problem}.",
            hint="Export the file again with this version of ensemble-kit.",
        ) from error
