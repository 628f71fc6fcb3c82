"""A predictions file of three videos, and one in CSV."""

import numpy as np

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.predictions.writing import write_predictions, write_predictions_csv
from ensemble_kit.store.provenance import FileMetadata, ModelMetadata

IDS = ("one", "zwei", "três")


NAMES = ("Game", "Vehicle", "Car", "Dance, modern")


LABELS = LabelLists.from_lists([[0, 2], [], [3]])


ROWS = np.array(
    [[0.5, 0.25, 1.0, 0.0], [0.125, 0.125, 0.75, 0.125], [0.0, 1e-7, 0.1234567, 0.9]], np.float32
)


MODEL = ModelMetadata(
    file=FileMetadata(path="../model.safetensors", sha256="a" * 64),
    kind="checkpoint",
    num_values=7,
    repeats=1,
)


def write(path, **changes):
    arguments = {
        "ids": IDS,
        "label_names": NAMES,
        "labels": LABELS,
        "rows": ROWS,
        "name": "gru",
        "model": MODEL,
        "force": False,
    }
    write_predictions(path, **(arguments | changes))
    return path


def write_csv(path, **changes):
    write_predictions_csv(path, **({"ids": IDS, "rows": ROWS, "force": False} | changes))
    return path
