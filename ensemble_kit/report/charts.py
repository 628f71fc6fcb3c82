"""The report's charts, drawn by Bokeh; axes and text take their colours from the page."""

import json
from collections.abc import Mapping, Sequence
from math import ceil, floor, log10
from typing import Any

from bokeh.embed import json_item
from bokeh.models import (
    BasicTicker,
    ColumnDataSource,
    DataRange1d,
    FactorRange,
    FixedTicker,
    HoverTool,
    NumeralTickFormatter,
)
from bokeh.models.annotations import Span
from bokeh.models.renderers import GlyphRenderer
from bokeh.plotting import figure
from bokeh.resources import Resources

from ensemble_kit.choices import Dtype
from ensemble_kit.files import format_size
from ensemble_kit.report.curves import Curve
from ensemble_kit.report.row import ENSEMBLE, Row
from ensemble_kit.report.timeline import Timeline
from ensemble_kit.serving.calibration_facts import Reliability
from ensemble_kit.store.selection_file import CandidateMetadata, FrontierMetadata, SelectionMetadata
from ensemble_kit.wording import counted, metric_name, printable, printable_line

MIB = 2**20
ROW = 26  # pixels of a class in a timeline
BLUE, ORANGE, GREY = "#3b82f6", "#d97706", "#8590a2"  # told apart on white and on near-black
PRECISION_COLORS: Mapping[Dtype, str] = {  # of frontiers of one precision
    "fp32": "#64748b", "fp16": "#0891b2", "bf16": "#7c3aed", "int8": "#059669", "int4": "#db2777",
}  # fmt: skip
CURVE_COLORS = (BLUE, ORANGE, "#059669", "#db2777", "#7c3aed", "#0891b2", GREY)
LONGEST_NAME = 28  # characters of a name beside its point
# Bokeh's variables are set to the page's, which change with the colour scheme.
STYLE = """
:host {
  --bk-background-fill-color: transparent; --bk-border-fill-color: transparent;
  --bk-outline-line-color: transparent; --bk-grid-line-color: var(--line);
  --bk-axis-line-color: var(--muted); --bk-axis-label-text-color: var(--muted);
  --bk-major-label-text-color: var(--text); --bk-major-tick-line-color: var(--muted);
  --bk-minor-tick-line-color: transparent;
}
.bk-Tooltip { --background-color: var(--surface); --color: var(--text);
  --divider-color: var(--line); font-size: 13px; }
"""


def bokeh_script() -> str:
    """Return the JavaScript that draws the charts, to be put into the page itself."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def chart_json(chart: figure) -> str:
    """Return a chart as JSON that can be put into a ``<script>``: it holds no ``<``."""
    return json.dumps(json_item(chart)).replace("<", "\\u003c")


def path_chart(selection: SelectionMetadata) -> figure:
    """Draw the score after each addition, with its interval."""
    chart = _figure(
        x_axis_label="additions",
        y_axis_label=selection.metric_name,
        x_range=DataRange1d(range_padding=0.12),
    )
    steps = selection.path
    bars = [
        (place, *step.interval)
        for place, step in enumerate(steps, start=1)
        if step.interval is not None
    ]
    if bars:
        at, low, high = (list(values) for values in zip(*bars, strict=True))
        chart.segment(x0=at, x1=at, y0=low, y1=high, line_color=BLUE, line_width=2, line_alpha=0.6)
    series = [("selection", GREY if selection.confirm else BLUE, [step.score for step in steps])]
    if selection.confirm:
        series.append(("held out", BLUE, [step.confirmed_score or 0.0 for step in steps]))
    marks = []
    for videos, color, scores in series:
        source = _steps_source(selection, videos, scores)
        chart.line("place", "score", source=source, line_color=color, line_width=2)
        scatter = chart.scatter(
            "place", "score", source=source, size=9, line_color=color, line_width=2,
            fill_color=color, fill_alpha="alpha",
        )  # fmt: skip
        marks.append(scatter)
    chart.text(
        "place", "score", text="short", source=source, text_align="side", y_offset=-12,
        text_font_size="12px", text_color=GREY,
    )  # fmt: skip
    _hover(
        chart,
        marks,
        {"added": "@added", "videos": "@videos", metric_name(selection.metric): "@score{0.0000}",
         "interval": "@interval", "gain": "@gain"},
    )  # fmt: skip
    chart.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    chart.yaxis.formatter = NumeralTickFormatter(format="0.000")
    return chart


def _steps_source(
    selection: SelectionMetadata, videos: str, scores: Sequence[float]
) -> ColumnDataSource:
    """Return what the marks of a path show; marks of additions that may be noise are hollow."""
    steps = selection.path
    return ColumnDataSource(
        {
            "place": list(range(1, len(steps) + 1)),
            "score": list(scores),
            "added": [printable(selection.label(step.added, step.dtype)) for step in steps],
            "short": [
                _shortened(printable(selection.label(step.added, step.dtype))) for step in steps
            ],
            # names at the ends stand within the chart, however narrow it is
            "side": ["left", *["center"] * (len(steps) - 2), "right"][: len(steps)],
            "videos": [videos] * len(steps),
            "interval": [_interval(step.interval) for step in steps],
            "gain": [_gain(step.confirmed_gain, step.gain) for step in steps],
            "alpha": [0.0 if step.is_distinguishable is False else 1.0 for step in steps],
        }
    )


def size_chart(selection: SelectionMetadata) -> figure | None:
    """Draw the score against bytes: the candidates, the frontier and the limit.

    Returns:
        The chart; None where no candidate's size is known.
    """
    sized = [candidate for candidate in selection.candidates if candidate.bytes]
    if not sized:
        return None
    sizes = [candidate.bytes + selection.shared_bytes for candidate in sized]
    low, high = size_range(selection)
    limit = min(selection.max_size / MIB, high)  # at the edge where it is far beyond
    chart = _figure(
        x_axis_label="MiB", y_axis_label=selection.metric_name,
        x_axis_type="log", x_range=(low, high),
    )  # fmt: skip
    chart.add_layout(
        Span(location=limit, dimension="height", line_color=ORANGE,
             line_dash="dashed", line_width=2)
    )  # fmt: skip
    metric = metric_name(selection.metric)
    is_member = [1.0 if candidate.skipped is None else 0.0 for candidate in sized]
    labels = [selection.label(candidate.name, candidate.dtype) for candidate in sized]
    candidates = _points(sizes, sized, labels, is_member)
    for dtype, ensembles_of_one in selection.frontiers.items():
        alone = _frontier_points(selection, ensembles_of_one)
        color = PRECISION_COLORS[dtype]
        chart.step("x", "score", source=alone, mode="after", line_color=color, line_width=1)
        points = chart.scatter(
            "x", "score", source=alone, size=5, line_color=color, fill_color=color
        )
        _hover(
            chart,
            [points],
            {"members": "@name", metric: "@score{0.0000}", "size": "@size"},
        )
    front = _frontier_points(selection, selection.frontier)
    chart.step("x", "score", source=front, mode="after", line_color=BLUE, line_width=2)
    ensembles = chart.scatter(
        "x", "score", source=front, size=7, line_color=BLUE, fill_color=BLUE, marker="diamond"
    )
    marks = chart.scatter(
        "x", "score", source=candidates, size=9, line_color=GREY, line_width=2, fill_color=GREY,
        fill_alpha="alpha",
    )  # fmt: skip
    _name_points(chart, candidates, low, high)
    _hover(
        chart,
        [marks],
        {"candidate": "@name", metric: "@score{0.0000}", "size": "@size"},
    )
    _hover(
        chart,
        [ensembles],
        {"members": "@name", metric: "@score{0.0000}", "size": "@size"},
    )
    chart.xaxis.ticker = FixedTicker(ticks=_ticks(low, high))
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0.[000]")
    chart.yaxis.formatter = NumeralTickFormatter(format="0.000")
    return chart


def size_range(selection: SelectionMetadata) -> tuple[float, float]:
    """Return where the axis of sizes begins and ends, in MiB: a little beyond what was measured."""
    sizes = [each.bytes + selection.shared_bytes for each in selection.candidates if each.bytes]
    ensembles = [selection.frontier, *selection.frontiers.values()]
    sizes += [each.bytes for frontier in ensembles for each in frontier if each.bytes]
    return min(sizes) / MIB / 1.3, 1.3 * max(sizes) / MIB


def _name_points(chart: figure, source: ColumnDataSource, low: float, high: float) -> None:
    """Write the name of each point beside it, on the side where there is room."""
    places = [(log10(mib) - log10(low)) / (log10(high) - log10(low)) for mib in source.data["x"]]
    source.data["short"] = [_shortened(name) for name in source.data["name"]]
    source.data["side"] = ["right" if place > 0.5 else "left" for place in places]
    source.data["across"] = [-9 if place > 0.5 else 9 for place in places]
    source.data["down"] = [9 if place % 2 else -9 for place in range(len(places))]
    chart.text(
        "x", "score", text="short", source=source, text_align="side", x_offset="across",
        y_offset="down", text_baseline="middle", text_font_size="12px", text_color=GREY,
    )  # fmt: skip


def timed_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the models that are drawn: one of each run, and of ensembles the exported ones.

    The last checkpoint of a run takes as long as the average, and a fused file is no file to serve;
    points that lie on each other would hide their names.
    """
    timed = [row for row in rows if row.seconds_per_video > 0]
    averaged = {row.model for row in timed if row.form == "averaged"}
    has_onnx = any(row.form == "onnx" for row in timed)
    return [
        row
        for row in timed
        if (row.model == ENSEMBLE and (row.form == "onnx" or not has_onnx))
        or (row.model != ENSEMBLE and (row.form == "averaged" or row.model not in averaged))
    ]


def _short_name(row: Row) -> str:
    return f"{row.model}, {counted(row.repeats, 'repeat')}" if row.model == ENSEMBLE else row.model


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def curves_chart(curves: Sequence[Curve]) -> figure:
    """Draw the validation GAP of each member while it was trained."""
    chart = _figure(x_axis_label="training steps", y_axis_label="GAP@20 of the checkpoint")
    for curve, color in zip(curves, curve_colors(curves), strict=True):
        source = ColumnDataSource(
            {
                "step": list(curve.steps),
                "gap": list(curve.gaps),
                "name": [printable(curve.name)] * len(curve.steps),
            }
        )
        chart.line("step", "gap", source=source, line_color=color, line_width=2)
        marks = chart.scatter("step", "gap", source=source, size=6, color=color)
        _hover(chart, [marks], {"member": "@name", "step": "@step{0,0}", "GAP": "@gap{0.0000}"})
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0")
    chart.yaxis.formatter = NumeralTickFormatter(format="0.000")
    return chart


def curve_colors(curves: Sequence[Curve]) -> list[str]:
    """Return a colour for each curve; more than there are colours begin again."""
    return [CURVE_COLORS[place % len(CURVE_COLORS)] for place in range(len(curves))]


def speed_chart(rows: Sequence[Row]) -> figure:
    """Draw the GAP of models against the seconds that a video takes; see ``timed_rows``."""
    timed = timed_rows(rows)
    seconds = [row.seconds_per_video for row in timed]
    low, high = min(seconds) / 1.5, 1.5 * max(seconds)
    chart = _figure(
        x_axis_label="seconds a video", y_axis_label=f"GAP@{rows[0].k}",
        x_axis_type="log", x_range=(low, high),
    )  # fmt: skip
    source = ColumnDataSource(
        {
            "x": seconds,
            "score": [row.gap for row in timed],
            "name": [printable(_short_name(row)) for row in timed],
            "form": [row.form for row in timed],
            "repeats": [row.repeats for row in timed],
            "color": [BLUE if row.model == ENSEMBLE else GREY for row in timed],
        }
    )
    marks = chart.scatter("x", "score", source=source, size=9, color="color")
    _name_points(chart, source, low, high)
    _hover(
        chart,
        [marks],
        {
            "model": "@name",
            "form": "@form",
            "repeats": "@repeats",
            "GAP": "@score{0.0000}",
            "s a video": "@x",
        },
    )
    chart.xaxis.ticker = FixedTicker(ticks=_ticks(low, high))
    chart.xaxis.formatter = NumeralTickFormatter(format="0.[00000]")
    chart.yaxis.formatter = NumeralTickFormatter(format="0.000")
    return chart


def reliability_chart(reliability: Reliability) -> figure:
    """Draw the share of labels against the probability, before calibration and after."""
    chart = _figure(
        x_axis_label="mean probability", y_axis_label="share that is correct",
        x_range=(0, 1), y_range=(0, 1),
    )  # fmt: skip
    chart.line([0, 1], [0, 1], line_color=ORANGE, line_dash="dashed", line_width=2)
    for name, color, bins in (
        ("before", GREY, reliability.before),
        ("after", BLUE, reliability.after),
    ):
        rows = [
            (mean, share, f"{round(pairs):,}")
            for mean, share, pairs in zip(bins.means, bins.shares, bins.pairs, strict=True)
            if pairs
        ]
        means, shares, pairs = (list(column) for column in zip(*rows, strict=True))
        source = ColumnDataSource(
            {"mean": means, "share": shares, "pairs": pairs, "name": [name] * len(rows)}
        )
        chart.line("mean", "share", source=source, line_color=color, line_width=2)
        marks = chart.scatter("mean", "share", source=source, size=8, color=color)
        _hover(
            chart,
            [marks],
            {"calibration": "@name", "probability": "@mean{0.000}", "correct": "@share{0.000}",
             "pairs": "@pairs"},
        )  # fmt: skip
    return chart


def timeline_chart(timeline: Timeline) -> figure:
    """Draw the probabilities of a video's classes over its windows, the stronger the higher."""
    names = [printable_line(name) for name in timeline.classes]
    places = dict(zip(timeline.classes, names, strict=True))
    cells = [
        (window.start, window.end, places[each.label], each.confidence)
        for window in timeline.windows
        for each in window.labels
        if each.label in places
    ]
    starts, ends, rows, confidences = (list(column) for column in zip(*cells, strict=True))
    source = ColumnDataSource(
        {"left": starts, "right": ends, "name": rows, "confidence": confidences}
    )
    chart = figure(
        y_range=FactorRange(factors=names[::-1]), x_axis_label="seconds",
        height=ROW * len(names) + 70, sizing_mode="stretch_width", tools="",
        toolbar_location=None, stylesheets=[STYLE],
    )  # fmt: skip
    bars = chart.hbar(
        y="name", left="left", right="right", height=0.9, source=source, line_color=None,
        fill_color=BLUE, fill_alpha="confidence",
    )  # fmt: skip
    _hover(
        chart,
        [bars],
        {"class": "@name", "seconds": "@left to @right", "probability": "@confidence{0.000}"},
    )
    return chart


def _figure(**options: Any) -> figure:
    return figure(
        height=360, sizing_mode="stretch_width", tools="", toolbar_location=None,
        stylesheets=[STYLE], **options,
    )  # fmt: skip


def ensemble_labels(selection: SelectionMetadata, ensemble: FrontierMetadata) -> list[str]:
    """Return what to call the members of an ensemble of a frontier."""
    return list(map(selection.label, ensemble.members, ensemble.dtypes))


def _frontier_points(
    selection: SelectionMetadata, frontier: Sequence[FrontierMetadata]
) -> ColumnDataSource:
    sized = [ensemble for ensemble in frontier if ensemble.bytes]
    names = [", ".join(ensemble_labels(selection, ensemble)) for ensemble in sized]
    return _points([each.bytes for each in sized], sized, names, [1.0] * len(sized))


def _points(
    sizes: Sequence[int],
    sized: Sequence[CandidateMetadata | FrontierMetadata],
    names: Sequence[str],
    alpha: Sequence[float],
) -> ColumnDataSource:
    return ColumnDataSource(
        {
            "x": [size / MIB for size in sizes],
            "score": [each.score for each in sized],
            "name": [printable(name) for name in names],
            "size": [format_size(size) for size in sizes],
            "alpha": list(alpha),
        }
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers for a logarithmic axis: 1, 2, 5, 10, …, or only powers of 10."""
    exponents = range(floor(log10(low)), ceil(log10(high)) + 1)
    mantissas = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = (mantissa * 10.0**exponent for exponent in exponents for mantissa in mantissas)
    return [tick for tick in ticks if low <= tick <= high]


def _hover(chart: figure, marks: "Sequence[GlyphRenderer[Any]]", shown: Mapping[str, str]) -> None:
    chart.add_tools(HoverTool(renderers=list(marks), tooltips=list(shown.items())))


def _interval(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _gain(confirmed: float | None, gain: float) -> str:
    return f"{gain:+.4f}" if confirmed is None else f"{gain:+.4f}, held out {confirmed:+.4f}"
