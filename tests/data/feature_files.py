"""The same four videos' features in the files of many tools."""

import numpy as np
import pytest
from example_bytes import byte_strings, floats, record

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.tfrecord import write_records

ONE = {"all": 1.0}
RANDOM = np.random.default_rng(0)
VIDEOS = {
    f"v{number}": {
        "rgb": RANDOM.standard_normal((number + 1, 5), np.float32),
        "audio": RANDOM.standard_normal((number + 1, 3), np.float32),
    }
    for number in range(4)
}


def write_labels(path, ids=VIDEOS, lines=None):
    lines = lines or [f"{video},{number % 3}" for number, video in enumerate(ids)]
    path.write_text("\n".join(["VideoId,Labels", *lines]) + "\n")
    return path


def read(folder):
    """Return the arrays of each video of converted records, by id."""
    videos = Records([f"{folder}/*/*.tfrecord"]).videos()
    return {video.id: (video.frames, video.classes.tolist()) for video in videos}


def padded(videos, name):
    longest = max(len(each[name]) for each in videos.values())
    return np.stack(
        [np.pad(each[name], ((0, longest - len(each[name])), (0, 0))) for each in videos.values()]
    )


def mediapipe(video, **more):
    lists = {
        f"{name.upper()}/feature/floats": [floats(row) for row in array.tolist()]
        for name, array in video.items()
    }
    return record(more, lists)


def write_npy(folder):
    for name in ("rgb", "audio"):
        (folder / name).mkdir()
        for video, each in VIDEOS.items():
            np.save(folder / name / f"{video}.npy", each[name].astype(np.float64))
    return [f"{name}={folder / name}" for name in ("rgb", "audio")]


def write_npz_each(folder):
    for video, each in VIDEOS.items():
        np.savez_compressed(folder / f"{video}.npz", **each)
    return [folder]


def write_npz_table(folder):
    counts = [len(each["rgb"]) for each in VIDEOS.values()]
    table = {name: padded(VIDEOS, name) for name in ("rgb", "audio")}
    np.savez(folder / "a.npz", ids=list(VIDEOS), num_frames=counts, **table)
    return [folder / "a.npz"]


def write_hdf5_groups(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.h5", "w") as file:
        for video, each in VIDEOS.items():
            for name, array in each.items():
                file[f"{video}/{name}"] = array
    return [folder / "a.h5"]


def write_hdf5_table(folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "a.hdf5", "w") as file:
        file["ids"] = list(VIDEOS)
        file["num_frames"] = [len(each["rgb"]) for each in VIDEOS.values()]
        for name in ("rgb", "audio"):
            file[name] = padded(VIDEOS, name)
    return [folder / "a.hdf5"]


def write_parquet(folder):
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {name: [each[name].tolist() for each in VIDEOS.values()] for name in ("rgb", "audio")}
    parquet.write_table(arrow.table({"id": list(VIDEOS), **columns}), folder / "a.parquet")
    return [folder / "a.parquet"]


def write_mediapipe(folder):
    for video, each in VIDEOS.items():
        (folder / f"{video}.pb").write_bytes(mediapipe(each))
    return [folder]


def write_mediapipe_records(folder):
    records = [
        mediapipe(each, **{"clip/media_id": byte_strings(video.encode())})
        for video, each in VIDEOS.items()
    ]
    write_records(folder / "a.tfrecord", records, force=False)
    return [folder / "a.tfrecord"]


WRITERS = [
    write_npy,
    write_npz_each,
    write_npz_table,
    write_hdf5_groups,
    write_hdf5_table,
    write_parquet,
    write_mediapipe,
    write_mediapipe_records,
]
