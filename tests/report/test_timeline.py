"""The classes of a few videos over time, as a report shows them."""

import json

import pytest

from ensemble_kit.cli import main
from ensemble_kit.errors import InputError
from ensemble_kit.report import page
from ensemble_kit.report.timeline import SHOWN_VIDEOS, read_timelines

HINT = "Write it with `ensemble-kit predict MODEL DATA --window 5 -o windows.jsonl`."


def line(video, start, **classes):
    labels = [
        {"label": name, "class": ord(name[0]) - 97, "confidence": confidence}
        for name, confidence in classes.items()
    ]
    return json.dumps({"video": video, "start": start, "end": start + 5.0, "labels": labels})


def write_lines(path, *lines):
    path.write_text("".join(f"{each}\n" for each in lines), encoding="utf-8")
    return path


def test_a_video_has_the_classes_that_are_highest_anywhere(tmp_path):
    many = {chr(97 + place): 0.1 + place / 20 for place in range(9)}
    path = write_lines(
        tmp_path / "w.jsonl",
        line("v", 0.0, a=0.5, b=0.9),
        line("v", 5.0, c=0.7, a=0.6),
        line("w", 0.0, **many),
        *(line(f"x{number}", 0.0, a=0.5) for number in range(9)),
    )

    first, second, *others = read_timelines(path)

    assert (first.video, first.classes) == ("v", ("b", "c", "a"))
    assert [(window.start, window.end) for window in first.windows] == [(0.0, 5.0), (5.0, 10.0)]
    assert second.classes == tuple("ihgfedcb")  # eight of nine
    assert len(others) == SHOWN_VIDEOS - 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", " holds no windows."),
        ('{"video": "v"', ": line 1 is no window of a video: "),
        (line("v", 0.0, a=1.5), ": line 1 is no window of a video: labels[0].confidence is 1.5"),
        (line("v", 0.0), ": line 1 is no window of a video: labels"),
        (line("v", -1.0, a=0.5), ": line 1 is no window of a video: start is -1.0"),
        ("\udcff", " cannot be read: it is no text."),
    ],
)
def test_what_is_no_file_of_windows_is_refused(text, problem, tmp_path):
    path = tmp_path / "w.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))

    with pytest.raises(InputError) as caught:
        read_timelines(path)

    assert str(caught.value).startswith(f"{path}{problem}")
    assert str(caught.value).endswith(f"\n{HINT}")


def test_the_windows_that_predict_writes_are_drawn(
    workspace, own_chosen, tmp_path, runner, monkeypatch
):
    monkeypatch.setattr(page, "bokeh_script", str)
    words = ["--window", "2", "--top-k", "3", "-o", str(tmp_path / "w.jsonl")]
    data = str(workspace.path / "data" / "test" / "*.tfrecord")
    predicted = runner.invoke(main, ["predict", str(workspace.averaged("mean")), data, *words])
    assert predicted.exit_code == 0, predicted.output
    output = tmp_path / "report.html"

    result = runner.invoke(
        main,
        ["report", "--selection", str(own_chosen.path), "--timeline", str(tmp_path / "w.jsonl"),
         "-o", str(output)],
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    text = output.read_text()
    for place, timeline in enumerate(read_timelines(tmp_path / "w.jsonl"), 1):
        assert f"<h3>{timeline.video}</h3>" in text
        drawn = text.split(f'data-chart="chart-timeline-{place}">')[1].split("</script>")[0]
        confidences = [
            each.confidence
            for window in timeline.windows
            for each in window.labels
            if each.label in timeline.classes
        ]
        assert json.dumps(confidences).replace(" ", "") in drawn.replace(" ", "")
