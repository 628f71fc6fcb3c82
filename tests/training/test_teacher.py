import numpy as np
import pytest
from builders import tiny_records, tiny_schema, train_tiny

from ensemble_kit.data.labels import LabelLists
from ensemble_kit.errors import OutputError, PredictionsError
from ensemble_kit.predictions.writing import write_predictions
from ensemble_kit.training.teacher import Teacher

SCHEMA = tiny_schema(num_classes=3, label_names=("cat", "dog", "car"))
LABELS = np.array([[True, False, False], [False, True, True]])


def write(path, *, ids=("a", "b", "c"), names=SCHEMA.names, top_k=None):
    rows = np.array([[0.5, 0.25, 0.125], [0.75, 0.5, 0.25], [1.0, 0.0, 0.5]], np.float32)
    write_predictions(
        path,
        ids=ids,
        label_names=names,
        labels=LabelLists.from_lists([[]] * len(ids)),
        rows=np.pad(rows, [(0, 0), (0, len(names) - 3)]),
        name="teacher",
        model=None,
        top_k=top_k,
        force=True,
    )
    return path


def test_targets_are_matched_by_video(tmp_path):
    teacher = Teacher(write(tmp_path / "teacher.safetensors"), 0.25, SCHEMA)

    targets = teacher.mixed(("c", "a"), LABELS)

    assert targets.dtype == np.float32
    np.testing.assert_allclose(
        targets,
        [[0.25 * 1.0 + 0.75, 0, 0.25 * 0.5], [0.25 * 0.5, 0.25 * 0.25 + 0.75, 0.25 * 0.125 + 0.75]],
    )


def test_a_class_that_the_teacher_does_not_list_has_probability_0(tmp_path):
    teacher = Teacher(write(tmp_path / "teacher.safetensors", top_k=1), 1.0, SCHEMA)

    np.testing.assert_array_equal(teacher.mixed(("a", "b"), LABELS), [[0.5, 0, 0], [0.75, 0, 0]])


def test_a_video_that_the_teacher_has_not_seen_is_named(tmp_path):
    path = write(tmp_path / "teacher.safetensors")

    with pytest.raises(PredictionsError) as caught:
        Teacher(path, 0.5, SCHEMA).mixed(("a", "d"), LABELS)

    assert str(caught.value) == (
        f"{path} lacks video 'd', which the training records have.\n"
        "Predict all of the training records with the teacher."
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("cat", "dog", "car", "sky"), "has 4 classes, but the training records have 3."),
        (("cat", "cow", "car"), "calls class 1 'cow', but the training records call it 'dog'."),
    ],
)
def test_a_teacher_of_another_vocabulary_is_refused(names, message, tmp_path):
    path = write(tmp_path / "teacher.safetensors", names=names)

    with pytest.raises(PredictionsError) as caught:
        Teacher(path, 0.5, SCHEMA)

    assert str(caught.value) == f"{path} {message}\nUse a teacher with the same vocabulary."


def test_a_teacher_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    path = write(tmp_path / "teacher.safetensors")

    with pytest.raises(PredictionsError):
        train_tiny(tmp_path / "tiny", tiny_records(tmp_path / "records"), teacher=path)

    assert not (tmp_path / "tiny").exists()


def test_a_run_is_not_gone_on_with_under_another_teacher(tmp_path):
    records = tiny_records(tmp_path / "records", num_videos=16)
    ids = [video.id for video in records[0].videos()]
    np.savez(tmp_path / "t.npz", probabilities=np.ones((16, 5), np.float32), ids=np.array(ids))
    train_tiny(tmp_path / "tiny", records, teacher=tmp_path / "t.npz")

    with pytest.raises(OutputError) as caught:
        train_tiny(tmp_path / "tiny", records, teacher=tmp_path / "t.npz", teacher_share=0.25)

    assert "holds a run with other values of: --teacher." in str(caught.value)
