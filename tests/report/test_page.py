"""What the page says, that it escapes it, and that it needs nothing else."""

import json
import re
import warnings

import pytest
from chosen_fixture import CLASSES, NAMES, write_chosen

from ensemble_kit.errors import OutputError, SelectionError
from ensemble_kit.report import page
from ensemble_kit.report.charts import size_range, timed_rows
from ensemble_kit.report.curves import Curve, training_curves
from ensemble_kit.report.evidence import Evidence, gather
from ensemble_kit.report.page import write_report
from ensemble_kit.report.row import Row
from ensemble_kit.selection.stage import select
from ensemble_kit.store.selection_file import TruncationMetadata

with warnings.catch_warnings():  # of what Python will drop, at import
    warnings.simplefilter("ignore", DeprecationWarning)
    import html5lib

LIMIT = 3_000_000
ROWS = [
    Row("rnn", "averaged", 1, 5, 0.8123, 0.9, 12_345_678, 0.00321),
    Row("ensemble", "fused bf16", 10, 5, 0.8765, 0.95, 56_789_012, 0.0456),
]


class Page:
    """A page as a browser reads it; markup that is not valid is an error."""

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
        self.root = parser.parse(self.text)

    def words(self, *ids):
        """All text of some sections, as one line; of the whole body without scripts with none."""
        elements = [self.root.find(f".//section[@id='{one}']") for one in ids]
        if not ids:
            elements = [self.root.find("body/main")]
        found = (text for element in elements for text in shown_text(element))
        return re.sub(r"\s+", " ", "".join(found))

    def rows(self, section, table=0):
        """The cells of a section's table, by row, the heading first."""
        found = self.root.findall(f".//section[@id='{section}']//table")[table]
        return [
            [re.sub(r"\s+", " ", "".join(cell.itertext())).strip() for cell in row]
            for row in found.iter("tr")
        ]


def shown_text(element):
    if element.tag != "script":
        yield element.text or ""
        for child in element:
            yield from shown_text(child)
            yield child.tail or ""


@pytest.fixture
def without_bokeh(monkeypatch):
    """Leave the 1.3 MB of JavaScript out, which takes seconds to parse."""
    monkeypatch.setattr(page, "bokeh_script", str)


@pytest.fixture(scope="module")
def standard(chosen, tmp_path_factory):
    """The page of the selection that most tests look at, with the models scored on records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "bokeh_script", str)
        output = tmp_path_factory.mktemp("page") / "report.html"
        return Page(write_report(chosen.path, output, rows=ROWS))


def page_of(chosen, **options):
    return Page(write_report(chosen.path, chosen.path.with_name("report.html"), **options))


def test_the_path_has_every_step_with_its_intervals(chosen, standard):
    rows = standard.rows("path")

    assert rows[0] == ["#", "added", "selection", "gain", "held out", "gain, held out",
                       "interval of the gain", "size"]  # fmt: skip
    assert len(rows) == 1 + len(chosen.selection.path) == 4
    for row, step in zip(rows[1:], chosen.selection.path, strict=True):
        assert row[1:4] == [step.added, f"{step.score:.4f}", f"{step.gain:+.4f}"]
        assert row[4] == f"{step.confirmed_score:.4f}"
        low, high = step.gain_interval
        assert row[6].startswith(f"{low:+.4f} to {high:+.4f}")
        assert row[6].endswith("noise?") == (not step.is_distinguishable)


def test_the_top_says_what_was_held_out_and_the_size(chosen, standard):
    words = standard.words()

    held_out, best = chosen.selection.confirm.held_out, chosen.selection.candidates[0]
    low, high = held_out.interval
    assert (
        f"{held_out.score:.4f}GAP@20 on {held_out.videos} held-out videos, "
        f"95% interval {low:.4f} to {high:.4f}"
    ) in words
    gain = held_out.score - best.confirmed_score
    assert (
        f"{gain:+.4f}above the best single candidate, {best.name} ({best.confirmed_score:.4f})"
    ) in words
    assert "13.4 MiBin bf16, 73.7% of the limit of 18.1 MiB" in words
    assert "3 of 4 candidates" in words
    assert "3members, mixed uniformly" in words
    chosen_by = chosen.selection.confirm.chosen_by
    assert (
        f"Members were chosen on {chosen_by.videos} selection videos, where the GAP is optimistic "
        f"for that reason; {held_out.videos} other videos were held out to confirm the choice. "
        "Bars are 95% bootstrap intervals over videos."
    ) in words


def test_a_candidate_has_its_gaps_parameters_bytes_in_each_type_and_why_it_is_no_member(
    chosen, standard
):
    heading, *rows = standard.rows("candidates")

    assert heading[4:] == [
        "parameters", "fp32", "fp16", "bf16", "int8", "int4", "seconds per video",
        "why it is not a member",
    ]  # fmt: skip
    assert [row[1] for row in rows] == [one.name for one in chosen.selection.candidates]
    place = [row[1] for row in rows].index(NAMES[2])
    assert rows[place][4:] == [
        "3,000,000", "11.4 MiB", "5.7 MiB", "5.7 MiB", "2.9 MiB", "1.4 MiB", "-",
        "It takes 5.7 MiB, but only 4.8 MiB remain.",
    ]  # fmt: skip


def test_the_frontier_is_a_table_too(chosen, standard):
    rows = standard.rows("size")[1:]

    assert [row[1] for row in rows] == [f"{one.score:.4f}" for one in chosen.selection.frontier]
    assert rows[-1][3] == ", ".join(chosen.selection.frontier[-1].members)


def test_classes_that_change_are_named_with_both_precisions(chosen, standard):
    rows = standard.rows("classes")

    changes = gather(chosen.selection, chosen.path.parent).changes
    assert rows == [
        ["class", "videos", "single", "ensemble", "change"],
        *(
            [one.name, str(one.positives), f"{one.single:.4f}", f"{one.ensemble:.4f}",
             f"{one.change:+.4f}"]
            for one in changes
        ),
    ]  # fmt: skip
    assert CLASSES[1] in {row[0] for row in rows}


def test_every_file_and_its_hash_stand_there_and_how_members_were_chosen(chosen, standard):
    words = standard.words("choice")

    for member in chosen.selection.members:
        assert f"{member.predictions.path} {member.predictions.sha256}" in words
        assert f"{member.model.file.path} {member.model.file.sha256}" in words
    for one in chosen.selection.candidates:
        assert one.predictions.sha256 in words
    assert chosen.selection.rule in words
    assert chosen.selection.dataset_sha256 in words
    assert chosen.selection.vocabulary_sha256 in words
    assert "20 resamples, seed 0, 95%" in words
    assert "greedy by gain; 9 ensembles measured" in words
    assert "90 videos with " in words


def test_models_scored_on_records_have_their_table_and_their_seconds(standard):
    assert standard.rows("models") == [
        ["model", "form", "repeats", "GAP@5", "Hit@1", "file", "seconds per video"],
        ["rnn", "averaged", "1", "0.8123", "0.9000", "11.8 MiB", "0.0032"],
        ["ensemble", "fused bf16", "10", "0.8765", "0.9500", "54.2 MiB", "0.0456"],
    ]
    heading, *rows = standard.rows("candidates")
    seconds = heading.index("seconds per video")
    assert {row[1]: row[seconds] for row in rows} == dict.fromkeys(NAMES, "-") | {"rnn": "0.0032"}


def test_names_are_escaped_wherever_they_stand(standard):
    assert NAMES[2] in standard.words("candidates")
    assert NAMES[2] in standard.words("choice")
    assert "<script>alert" not in standard.text
    assert "<b>Bold" not in standard.text
    charts = standard.root.findall(".//script[@data-chart]")
    assert {one.get("data-chart") for one in charts} == {
        "chart-path", "chart-size", "chart-speed"
    }  # fmt: skip
    assert all("<" not in one.text for one in charts)
    assert "alert(1)" in charts[1].text


def test_the_page_is_one_small_file_that_fetches_nothing(chosen, tmp_path):
    found = Page(write_report(chosen.path, tmp_path / "report.html"))

    assert len(found.text.encode()) < LIMIT
    policy = found.root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    names = {name for element in found.root.iter() for name in element.attrib}
    assert not names & {"src", "href", "srcset", "action", "data", "poster", "onclick"}
    assert {"link", "iframe", "img", "object", "base"}.isdisjoint(
        element.tag for element in found.root.iter()
    )
    assert not re.search(r"@import|url\(", found.root.find(".//style").text)


def test_what_is_missing_is_said_and_the_rest_stands(own_chosen, without_bokeh):
    for file in own_chosen.files.values():
        file.unlink()

    found = page_of(own_chosen)

    assert "Agreement needs the predictions of at least two candidates." in found.words()
    assert "This table needs the predictions of mean and of every member." in found.words("classes")
    assert "rnn: ../runs/run-3.safetensors is not there." in found.words("choice")
    assert len(found.rows("candidates")) == 1 + len(NAMES)
    assert len(found.root.findall(".//script[@data-chart]")) == 2


def test_a_selection_by_all_videos_without_intervals_says_that_it_is_optimistic(
    tmp_path, without_bokeh
):
    chosen = write_chosen(tmp_path, confirm=0, resamples=0)

    found = page_of(chosen)

    assert re.search(rf"{chosen.selection.score:.4f}GAP@20 on 90 videos ?\+", found.words())
    assert (
        "Members were chosen on the same 90 videos that the figures are measured on, so the "
        "figures are optimistic."
    ) in found.words("path")
    assert found.rows("path")[0] == ["#", "added", "GAP@20", "gain", "size"]
    assert "Bootstrapnone" in found.words("choice").replace(" none", "none")


def test_the_metric_that_members_were_chosen_by_is_named_everywhere(tmp_path, without_bokeh):
    chosen = write_chosen(tmp_path, metric="macro-map")

    page = page_of(chosen)

    held_out = chosen.selection.confirm.held_out
    assert f"{held_out.score:.4f}macro mAP on {held_out.videos} held-out videos" in page.words()
    assert "where the macro mAP is optimistic" in page.words()
    assert "GAP" not in page.words()


def test_other_ways_of_searching_and_mixing_are_told(tmp_path, without_bokeh):
    chosen = write_chosen(
        tmp_path, strategy="beam", beam_width=3, mixing="optimised", start=["bag"],
        exclude=["mean"], max_members=2,
    )  # fmt: skip

    words = page_of(chosen).words()

    found = chosen.selection.optimised
    assert "beam of width 3 by gain" in words
    assert "at most 2 members; started from bag; without mean; greedy reaches" in words
    assert (
        f"Optimising the coefficients changed the GAP from {found.uniform_score:.4f} to "
        f"{found.score:.4f}, and on the held-out videos"
    ) in words
    assert "mixed by optimised coefficients" in words


def test_given_members_and_coefficients_are_not_said_to_be_chosen(tmp_path, without_bokeh):
    chosen = write_chosen(
        tmp_path, coefficients={"bag": 0.75, "rnn": 0.25}, strategy=None, confirm=None
    )

    words = page_of(chosen).words()

    assert "2members, mixed by coefficients that were given" in words
    assert "Members and coefficients were given, and measured on 90 videos." in words
    assert "Searchnone; bag, rnn were given Videos" in words
    assert "It was given no coefficient." in words
    assert "optimistic" not in words


def test_candidates_of_unknown_size_have_no_chart_of_sizes(tmp_path, without_bokeh):
    for name, score in (("a", 0.9), ("b", 0.7)):
        lines = ["VideoId,LabelConfidencePairs", f"x,0 {score} 1 0.8", f"y,1 {score}"]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = tmp_path / "labels.csv"
    labels.write_text("VideoId,Labels\nx,0\ny,1\n", encoding="utf-8")
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    select(paths, output=tmp_path / "selection.json", labels_path=labels)

    found = Page(write_report(tmp_path / "selection.json", tmp_path / "report.html"))

    assert "The sizes of the candidates are not known." in found.words("size")
    assert found.rows("candidates")[1][3:8] == ["-", "-", "-", "-", "-"]
    assert "No class with at least 20 videos changes." in found.words("classes")
    assert "Vocabularynot known" in found.words("choice")
    assert [row[-1] for row in found.rows("path")[1:]] == ["-"]
    assert [row[4] for row in found.rows("choice")[1:]] == ["-"]


def test_one_of_a_thing_has_no_plural(tmp_path, without_bokeh):
    chosen = write_chosen(tmp_path, exclude=["bag", "rnn", "<script>alert(1)</script>"])

    words = page_of(chosen).words()

    assert "1 of 1 candidate, from" in words
    assert "1member, mixed uniformly" in words
    assert "greedy by gain; 1 ensemble measured" in words


def test_names_that_would_steer_what_shows_them_are_escaped(tmp_path, without_bokeh):
    name = "evil\u202egnp\x1b[31m"
    for stem, score in ((name, 0.9), ("b", 0.7)):
        lines = ["VideoId,LabelConfidencePairs", f"x,0 {score} 1 0.8", f"y,1 {score}"]
        (tmp_path / f"{stem}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "labels.csv").write_text("VideoId,Labels\nx,0\ny,1\n", encoding="utf-8")
    select(
        [tmp_path / f"{name}.csv", tmp_path / "b.csv"],
        output=tmp_path / "selection.json",
        labels_path=tmp_path / "labels.csv",
        sizes={name: 5, "b": 5},
    )

    found = Page(write_report(tmp_path / "selection.json", tmp_path / "report.html"))

    assert r"evil\u202egnp\x1b[31m" in found.words("candidates")
    assert "\u202e" not in found.text
    assert "\x1b" not in found.text
    charts = [json.loads(one.text) for one in found.root.findall(".//script[@data-chart]")]
    assert len(charts) == 1  # of sizes: one member has no path
    assert "\u202e" not in json.dumps(charts, ensure_ascii=False)


def test_a_page_is_not_replaced_unless_told_to(chosen, tmp_path, without_bokeh):
    output = tmp_path / "report.html"
    output.write_text("mine", encoding="utf-8")

    with pytest.raises(OutputError) as caught:
        write_report(chosen.path, output)

    assert str(caught.value) == (
        f"{output} exists already.\nName another output, or replace it with --force."
    )
    assert output.read_text(encoding="utf-8") == "mine"
    assert Page(write_report(chosen.path, output, force=True)).rows("path")


def test_no_selection_no_page(tmp_path):
    with pytest.raises(SelectionError) as caught:
        write_report(tmp_path / "selection.json", tmp_path / "report.html")

    assert str(caught.value) == (
        f"{tmp_path / 'selection.json'} cannot be read: No such file or directory.\n"
        "Run `ensemble-kit select` first, or name a selection that exists."
    )
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("is_decided", "words"),
    [
        (True, "and the same members would be chosen."),
        (False, "and other members might be chosen."),
        (None, "and these bounds do not say whether other members would be chosen."),
    ],
)
def test_truncated_predictions_are_named_with_what_they_leave_open(
    chosen, without_bokeh, is_decided, words
):
    first = chosen.selection.candidates[0]
    truncation = TruncationMetadata(
        candidates=(first.name,), score_bounds=(0.25, 0.75), is_decided=is_decided
    )
    selection = chosen.selection.model_copy(
        update={
            "truncation": truncation,
            "left_out": 3,
            "candidates": (
                first.model_copy(update={"top_k": 100}),
                *chosen.selection.candidates[1:],
            ),
        }
    )

    text = page.render(selection, Evidence(None, None, {}), [], selection_name="s.json")

    assert (
        f"Whatever the probabilities of the others are, the GAP is from 0.2500 to 0.7500, {words}"
    ) in text
    assert f"{first.name} keeps only some classes of each video." in text
    assert "(top 100)" in text
    assert "3 videos left out because some file lacks them" in text


def test_the_headline_is_the_exported_ensemble_on_the_records_that_were_given(
    chosen, tmp_path, without_bokeh
):
    rows = [*ROWS, Row("ensemble", "onnx", 3, 5, 0.8712, 0.95, 56_789_012, 0.02)]

    words = Page(write_report(chosen.path, tmp_path / "report.html", rows=rows)).words()

    assert (
        "0.8712GAP@5 on the test records, onnx, 3 repeats; +0.0589 above the best single model, "
        "rnn, averaged"
    ) in words
    alone = Page(write_report(chosen.path, tmp_path / "b.html", rows=ROWS[:1])).words()
    assert "on the test records" not in alone


def test_agreement_is_a_table_of_names_and_values(standard, chosen):
    shares = gather(chosen.selection, chosen.path.parent).agreement.shares

    heading, *rows = standard.rows("agreement")

    assert heading == ["", "1", "2", "3", "4"]
    names = [candidate.name for candidate in chosen.selection.candidates]
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        values = [f"{100 * share:.0f}" for share in shares[place]]
        values[place] = "-"
        assert row == [f"{place + 1} {name}", *values]


def test_every_class_that_some_video_has_can_be_searched_for(standard, chosen):
    table = standard.root.find(".//table[@id='all-classes']")
    names = ["".join(row[0].itertext()) for row in table.find("tbody")]

    assert sorted(names) == sorted(CLASSES)
    counts = [int(row[1].get("data-value")) for row in table.find("tbody")]
    assert counts == sorted(chosen.labels.sum(axis=0), reverse=True)
    assert standard.root.find(".//input[@type='search']").get("data-filters") == "all-classes"


def test_training_is_shown_where_the_runs_are(own_chosen, without_bokeh):
    member = own_chosen.selection.members[0]
    folder = own_chosen.files[member.name].parent
    lines = [{"step": 1, "loss": 2.5}, *(
        {"step": step, "validation": {"gap": gap}} for step, gap in ((2, 0.25), (4, 0.5))
    )]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    found = page_of(own_chosen)

    curves = training_curves(own_chosen.selection, own_chosen.path.parent)
    assert curves[0] == Curve(member.name, (2, 4), (0.25, 0.5))
    assert "chart-curves" in found.text
    assert member.name in found.words("training")


def test_one_member_is_said_to_be_one_and_the_axis_ends_where_the_candidates_do(
    tmp_path, without_bokeh
):
    chosen = write_chosen(tmp_path, exclude=["bag", "rnn", "<script>alert(1)</script>"],
                          max_size=2**40)  # fmt: skip

    found = page_of(chosen)

    assert "The ensemble is one member, mean: there is no path to draw." in found.words("path")
    assert "chart-path" not in found.text
    assert ", beyond the right edge" in found.words("size")
    low, high = size_range(chosen.selection)
    largest = max(candidate.bytes for candidate in chosen.selection.candidates) / 2**20
    assert low < largest < high < 2 * largest


def test_of_models_that_take_as_long_one_is_drawn():
    rows = [
        Row("gru", form, repeats, 5, 0.5, 0.5, 1, seconds)
        for form, repeats, seconds in (("last checkpoint", 1, 0.1), ("averaged", 1, 0.1))
    ]
    rows.append(Row("bag", "last checkpoint", 1, 5, 0.4, 0.4, 1, 0.2))
    fused = Row("ensemble", "fused bf16", 10, 5, 0.6, 0.6, 1, 0.3)
    onnx = Row("ensemble", "onnx", 10, 5, 0.6, 0.6, 1, 0.2)

    assert timed_rows([*rows, fused, onnx]) == [*rows[1:], onnx]
    assert timed_rows([*rows, fused]) == [*rows[1:], fused]
    assert timed_rows([Row("a", "averaged", 1, 5, 0.5, 0.5, 1, 0.0)]) == []
