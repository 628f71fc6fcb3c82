"""Soft targets: an ensemble's predictions for the videos that a sub-model learns from.

As the winners of 2018 did (miha-skalic/youtube8mchallenge), the loss is a weighted mean of the
cross entropy with the labels and the cross entropy with the teacher's probabilities. Because cross
entropy is linear in its targets, that is the cross entropy with the weighted mean of both.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensemble_kit.data.schema import Schema
from ensemble_kit.errors import PredictionsError
from ensemble_kit.predictions.file import read_predictions


class Teacher:
    """A predictions file of the training records, by video.

    Args:
        path: The file: the kit's, NumPy's or a challenge CSV. Classes that it does not list for a
            video have probability 0.
        share: The teacher's share of the targets, in [0, 1]; the labels have the rest.
        schema: The schema of the training records.

    Raises:
        CheckpointError: A tensor file is not a whole predictions file.
        PredictionsError: The file cannot be read, or has another vocabulary.
    """

    def __init__(self, path: Path, share: float, schema: Schema) -> None:
        self._predictions = read_predictions(path, num_classes=schema.num_classes)
        self._share = share
        self._places = {video: place for place, video in enumerate(self._predictions.ids)}
        difference = self._predictions.vocabulary.difference(schema.vocabulary)
        if difference is not None:
            raise PredictionsError(
                difference.between(str(path), "the training records"),
                hint="Use a teacher with the same vocabulary.",
            )

    def mixed(self, ids: Sequence[str], labels: NDArray[np.bool_]) -> NDArray[np.floating[Any]]:
        """Return the targets of some videos, ``(B, C)`` float32 in [0, 1].

        Args:
            ids: B video ids.
            labels: ``(B, C)``.

        Raises:
            PredictionsError: The file lacks one of the videos.
        """
        missing = next((video for video in ids if video not in self._places), None)
        if missing is not None:
            raise PredictionsError(
                f"{self._predictions.path} lacks video {missing!r}, which the training records "
                "have.",
                hint="Predict all of the training records with the teacher.",
            )
        places = np.array([self._places[video] for video in ids], np.int64)
        rows = self._predictions.taken(places).astype(np.float32, copy=False)
        soft = np.maximum(rows, 0)  # -inf where a class is not listed
        return self._share * soft + (1 - self._share) * labels.astype(np.float32)
