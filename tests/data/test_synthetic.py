import numpy as np
import pytest

from ensemble_kit.data import synthetic
from ensemble_kit.data.dataset import Records
from ensemble_kit.data.schema import read_schema
from ensemble_kit.data.synthetic import World, quantise, synthesize
from ensemble_kit.errors import OutputError
from ensemble_kit.metrics import global_average_precision

SMALL = {"modalities": {"rgb": 5, "audio": 3}, "num_classes": 7, "frames": (2, 6)}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def write(folder, num_videos=None, **chosen):
    return synthesize(folder, num_videos=num_videos or {"train": 9, "test": 4}, **SMALL, **chosen)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, seed=seed)

    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert len(a) == 10
    assert a == b
    assert a.keys() == c.keys()
    assert all((a[path] != c[path]) == (path.suffix == ".tfrecord") for path in a)


def test_a_video_depends_on_neither_the_number_of_videos_nor_of_shards(tmp_path):
    write(tmp_path / "few", {"train": 3}, num_shards=1)
    write(tmp_path / "many", {"validate": 2, "train": 9}, num_shards=5)

    few, many = (
        {v.id: v.frames["rgb"].tolist() for v in Records([tmp_path / name / "train"]).videos()}
        for name in ("few", "many")
    )

    assert len(list((tmp_path / "many" / "train").iterdir())) == 5
    assert len(many) == 9
    assert few.items() <= many.items()


def test_records_are_what_was_asked_for(tmp_path):
    schema = write(tmp_path)

    videos = list(Records([tmp_path / "train", tmp_path / "test"]).videos())

    assert schema == read_schema(tmp_path / "schema.toml")
    assert schema.interface == (("rgb", 5, "uint8"), ("audio", 3, "uint8"))
    assert schema.names[:4] == ("steady 0", "burst 1", "order 2", "steady 3")
    assert len({video.id for video in videos}) == 13
    assert {video.num_frames for video in videos} == set(range(2, 7))
    assert all(len(video.classes) >= 1 for video in videos)


def test_video_level_records_are_one_frame_of_means(tmp_path):
    schema = write(tmp_path / "means", {"train": 3}, level="video")
    write(tmp_path / "frames", {"train": 3})

    means, frames = (
        list(Records([tmp_path / name / "train"]).videos()) for name in ("means", "frames")
    )

    assert schema.interface == (("rgb", 5, "float32"), ("audio", 3, "float32"))
    assert [modality.key for modality in schema.modalities] == ["mean_rgb", "mean_audio"]
    for mean, video in zip(means, frames, strict=True):
        decoded = video.frames["rgb"] / 255 * 4 - 2
        np.testing.assert_allclose(
            mean.frames["rgb"], decoded.mean(axis=0, keepdims=True), atol=0.5 * 4 / 255 + 1e-6
        )


def test_values_are_quantised_as_the_challenge_does():
    values = np.array([-3, -2, -1.999, 0, 0.5, 1.99, 2, 9], np.float32)

    expected = [round((min(max(float(v), -2), 2) + 2) * 255 / 4) for v in values]

    assert quantise(values).tolist() == expected
    assert expected[0] == 0
    assert expected[-1] == 255


def test_label_skew_makes_low_classes_frequent(tmp_path):
    counts = {}
    for skew in (0.0, 1.5):
        folder = tmp_path / str(skew)
        write(folder, {"train": 300}, label_skew=skew)
        counts[skew] = np.bincount(
            np.concatenate([video.classes for video in Records([folder / "train"]).videos()])
        )

    assert counts[0.0].max() < 1.5 * counts[0.0].min()
    assert counts[1.5][0] > 2 * counts[1.5][-1]


def test_two_order_classes_differ_in_the_order_of_the_same_frames():
    world = World.draw({"rgb": 5}, 7, 1.0, 0)

    def signal(classes):  # the same draws each time, so that only the classes differ
        draws = [world.video(each, 32, np.random.default_rng(3)) for each in (classes, [])]
        return draws[0] - draws[1]

    one, other = signal([2]), signal([5])

    np.testing.assert_allclose(one.sum(axis=0), other.sum(axis=0), atol=1e-5)
    shown = np.flatnonzero(np.abs(one).sum(axis=1) > 1e-3)
    assert shown.tolist() == list(range(shown[0], shown[0] + 8))
    np.testing.assert_allclose(one[shown], np.roll(other[shown], 4, axis=0), atol=1e-5)
    assert np.abs(one - other).max() > 0.1


def test_an_average_of_frames_tells_far_more_than_the_prior(tmp_path):
    synthesize(tmp_path, num_videos={"train": 1000, "validate": 300})

    def read(split):
        (batch,) = Records([tmp_path / split]).batches(1000)
        joint = np.concatenate(list(batch.frames.values()), axis=-1).astype(np.float64)
        means = joint.sum(axis=1) / batch.num_frames[:, None]  # zeros are padding
        return means, batch.labels.dense(50)

    (features, labels), (held_out, truth) = read("train"), read("validate")
    centre, prior = features.mean(axis=0), labels.mean(axis=0)
    features, held_out = features - centre, held_out - centre
    ridge = features.T @ features + len(features) * np.eye(features.shape[1])
    predicted = held_out @ np.linalg.solve(ridge, features.T @ (labels - prior)) + prior

    gap = global_average_precision(predicted, truth)

    assert gap > global_average_precision(np.tile(prior, (len(truth), 1)), truth) + 0.3


def test_a_call_that_was_stopped_is_made_again_without_force(tmp_path, monkeypatch):
    sizes = {"train": 5, "test": 3}
    whole = synthetic.write_records
    synthesize(tmp_path / "whole", num_videos=sizes, modalities={"rgb": 2}, num_shards=2)

    def write_and_stop(path, records, *, force):
        whole(path, records, force=force)
        if path.name == "test0000.tfrecord":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(synthetic, "write_records", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            synthesize(tmp_path / "own", num_videos=sizes, modalities={"rgb": 2}, num_shards=3)
    synthesize(tmp_path / "own", num_videos=sizes, modalities={"rgb": 2}, num_shards=2)

    files = [
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.*")}
        for folder in (tmp_path / "whole", tmp_path / "own")
    ]
    assert files[0] == files[1]
    with pytest.raises(OutputError):
        synthesize(tmp_path / "own", num_videos=sizes, modalities={"rgb": 2}, num_shards=2)


def test_existing_records_are_kept_without_force_and_all_replaced_with_it(tmp_path):
    write(tmp_path)
    before = contents(tmp_path)

    with pytest.raises(OutputError) as error:
        write(tmp_path, seed=5)
    (tmp_path / "schema.toml").unlink()
    with pytest.raises(OutputError) as shard_error:
        write(tmp_path, seed=5)

    hint = "Name another output, or replace it with --force."
    assert str(error.value) == f"{tmp_path}/schema.toml exists already.\n{hint}"
    assert str(shard_error.value) == f"{tmp_path}/train/train0000.tfrecord exists already.\n{hint}"
    assert contents(tmp_path).items() < before.items()

    write(tmp_path, num_shards=2, force=True)
    assert len(list(tmp_path.glob("*/*.tfrecord"))) == 4
