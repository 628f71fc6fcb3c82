"""One video to the bytes of its record, in the challenge's format."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.choices import Level
from ensemble_kit.data.decode import Layout
from ensemble_kit.data.protos import Feature, RawExample
from ensemble_kit.data.schema import Modality, Schema

LOW, HIGH = -2.0, 2.0  # what the challenge's bytes cover
DEQUANTISATION_SCALE = 4.0 / 255.0
DEQUANTISATION_OFFSET = 4.0 / 512.0 - 2.0


def quantise(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return ``round((clip(x, -2, 2) + 2) * 255 / 4)``, as the challenge's encoder does."""
    scaled: NDArray[np.float32] = (np.clip(values, LOW, HIGH) + 2) * (255 / 4)
    return np.rint(scaled).astype(np.uint8)


def dequantise(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return ``q * 4/255 + (4/512 - 2)``, float32: what the challenge's reader, and ours, sees.

    It lies 4/512 above the inverse of ``quantise``.
    """
    scaled = values.astype(np.float32) * np.float32(DEQUANTISATION_SCALE)
    return scaled + np.float32(DEQUANTISATION_OFFSET)


def record_schema(
    widths: Mapping[str, int],
    value_types: Mapping[str, Any],
    *,
    level: Level,
    label_names: Sequence[str] | None,
    num_classes: int,
    **more: Any,
) -> Schema:
    """Return the schema of records with the challenge's keys.

    Args:
        widths: The width of each modality, in joining order.
        value_types: ``uint8`` or ``float32`` for each modality.
        level: ``frame``, with keys such as ``rgb``, or ``video``, with keys such as ``mean_rgb``.
        label_names: C names, or None.
        num_classes: C.
        more: Other fields of ``Schema``.
    """
    return Schema(
        level=level,
        modalities=tuple(
            Modality(
                name=name,
                key=name if level == "frame" else f"mean_{name}",
                width=width,
                value_type=value_types[name],
            )
            for name, width in widths.items()
        ),
        id_key="id",
        labels_key="labels",
        num_classes=num_classes,
        label_names=None if label_names is None else tuple(label_names),
        **more,
    )


class Encoder:
    """Writes records by one schema; ``Decoder`` reads them back.

    Args:
        schema: What the records hold.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._layouts = [Layout(modality, schema.level) for modality in schema.modalities]

    def encode(
        self, video: str, classes: Sequence[int], frames: Mapping[str, NDArray[Any]]
    ) -> bytes:
        """Return the record of a video.

        Args:
            video: Its id.
            classes: Its class indices.
            frames: ``(T, D)`` for each modality's name, of the schema's type; T is 1 at video
                level.
        """
        example = RawExample()
        identity, labels = Feature(), Feature()
        identity.bytes_list.value.append(video.encode())
        labels.int64_list.value.extend(classes)
        for key, feature in ((self._schema.id_key, identity), (self._schema.labels_key, labels)):
            example.context.feature.add(key=key.encode(), value=[feature.SerializeToString()])
        streams = example.feature_lists if self._schema.level == "frame" else example.context
        for layout in self._layouts:
            streams.feature.add(key=layout.key, value=[layout.written(frames[layout.name])])
        return example.SerializeToString()  # type: ignore[no-any-return]
