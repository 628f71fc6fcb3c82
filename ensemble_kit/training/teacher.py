"""Soft targets: what an ensemble has predicted for the videos that a sub-model learns from.

As the winners of 2018 did (miha-skalic/youtube8mchallenge): the loss is a mean of the cross
entropy with the labels and of that with the teacher's probabilities, which is the cross entropy
with the mean of both, because it is linear in them.
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
    """The predictions of a file, by video.

    Args:
        path: A predictions file of the training records: the kit's, NumPy's or a challenge CSV.
            Classes that it does not list for a video have probability 0.
        share: What the teacher counts, in [0, 1]; the labels count the rest.
        schema: What the training records hold.

    Raises:
        CheckpointError: A tensor file is not a whole predictions file.
        PredictionsError: The file cannot be read, or is of another vocabulary.
    """

    def __init__(self, path: Path, share: float, schema: Schema) -> None:
        self._predictions = read_predictions(path, num_classes=schema.num_classes)
        self._share = share
        self._places = {video: place for place, video in enumerate(self._predictions.ids)}
        difference = self._predictions.vocabulary.difference(schema.vocabulary)
        if difference is not None:
            raise PredictionsError(
                difference.between(str(path), "the training records"),
                hint="Use a teacher of the same vocabulary.",
            )

    def mixed(self, ids: Sequence[str], labels: NDArray[np.bool_]) -> NDArray[np.floating[Any]]:
        """Return the targets of some videos, ``(B, C)`` float32 in [0, 1].

        Args:
            ids: B video ids.
            labels: ``(B, C)``.

        Raises:
            PredictionsError: The teacher has not seen one of the videos.
        """
        missing = next((video for video in ids if video not in self._places), None)
        if missing is not None:
            raise PredictionsError(
                f"{self._predictions.path} lacks video {missing!r}, which the training records "
                "have.",
                hint="Predict the training records with the teacher, all of them.",
            )
        places = np.array([self._places[video] for video in ids], np.int64)
        rows = self._predictions.taken(places).astype(np.float32, copy=False)
        soft = np.maximum(rows, 0)  # -inf where a class is not listed
        return self._share * soft + (1 - self._share) * labels.astype(np.float32)
