"""All real records, against the table of their README."""

import pytest

from ensemble_kit.data.dataset import Records
from ensemble_kit.data.kinds import title_of
from ensemble_kit.data.schema import read_label_names
from ensemble_kit.data.summary import summarise

pytestmark = pytest.mark.realdata


@pytest.mark.parametrize(
    ("split", "count"), [("train", 18_201), ("validate", 3_959), ("test", 11_061)]
)
def test_audioset_is_read_whole(real_data, split, count):
    records = Records(
        [real_data / "audioset" / "frame" / split],
        label_names=real_data / "audioset" / "class_labels_indices.csv",
    )

    summary = summarise(records)

    assert summary["kind"] == "AudioSet frame level"
    assert records.schema.interface == (("audio", 128, "uint8"),)
    assert summary["records"] == records.count() == count
    assert summary["frames"]["max"] == 10
    assert summary["labels"]["mean"] == pytest.approx(2.4, abs=0.2)
    assert {each["name"] for each in summary["classes"][:10]} >= {"Speech", "Music"}


@pytest.mark.parametrize(
    ("split", "count"), [("train", 23_091), ("validate", 2_862), ("test", 2_839)]
)
def test_youtube8m_video_level_is_read_whole(real_data, split, count):
    records = Records(
        [real_data / "yt8m" / "video" / split],
        label_names=real_data / "yt8m" / "label_names_2018.csv",
    )

    summary = summarise(records)

    assert summary["kind"] == "YouTube-8M video level (2018)"
    assert records.schema.interface == (("rgb", 1024, "float32"), ("audio", 128, "float32"))
    assert summary["records"] == records.count() == count
    assert summary["frames"]["max"] == 1
    assert summary["labels"]["mean"] == pytest.approx(3.0, abs=0.05)
    assert [each["name"] for each in summary["classes"][:2]] == ["Game", "Video game"]


def test_the_youtube8m_frame_level_record_is_read(real_data):
    records = Records([real_data / "yt8m" / "frame"])

    (video,) = records.videos()

    assert title_of(records.schema) == "YouTube-8M frame level (2018)"
    assert records.schema.interface == (("rgb", 1024, "uint8"), ("audio", 128, "uint8"))
    assert video.num_frames == 170
    assert video.frames["rgb"].shape == (170, 1024)


def test_names_with_commas_that_nobody_quoted_are_read_whole(real_data):
    names = read_label_names(real_data / "yt8m" / "label_names_2018.csv", 3862)

    assert names[271] == "Nike, Inc."
