"""The HTML page: a template filled with escaped text and numbers, in a single file."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ensemble_kit._version import __version__
from ensemble_kit.choices import AnyPath
from ensemble_kit.errors import ProviderError
from ensemble_kit.files import format_size, refuse_overwrite, require_suffix, written_aside
from ensemble_kit.report.charts import (
    BLUE,
    GREY,
    MIB,
    ORANGE,
    PRECISION_COLORS,
    bokeh_script,
    chart_json,
    curve_colors,
    curves_chart,
    ensemble_labels,
    path_chart,
    reliability_chart,
    size_chart,
    size_range,
    speed_chart,
    timed_rows,
    timeline_chart,
)
from ensemble_kit.report.curves import Curve, training_curves
from ensemble_kit.report.evidence import FEWEST_POSITIVES, Evidence, gather
from ensemble_kit.report.row import ENSEMBLE, Row
from ensemble_kit.report.timeline import Timeline, read_timelines
from ensemble_kit.serving.calibration import Calibration
from ensemble_kit.serving.calibration_facts import CalibrationFacts, calibration_facts
from ensemble_kit.serving.onnx_file import read_properties
from ensemble_kit.serving.session import without_prefix
from ensemble_kit.store.dtypes import DTYPES
from ensemble_kit.store.selection_file import SelectionMetadata, read_selection
from ensemble_kit.wording import counted, metric_name, printable


def write_report(
    selection_path: AnyPath,
    output: AnyPath,
    *,
    rows: Sequence[Row] = (),
    calibrated: AnyPath | None = None,
    timeline: AnyPath | None = None,
    force: bool = False,
) -> Path:
    """Write a selection as one HTML page that needs no other file and no network.

    Where a predictions file is missing or has changed, what it would have shown is left out, and
    the page says so.

    Args:
        selection_path: The ``selection.json``.
        output: The page to write, about 1.5 MB.
        rows: What models scored on records, for a separate table.
        calibrated: An exported file that ``calibrate`` wrote, whose reliability is shown.
        timeline: A ``.jsonl`` file that ``predict --window`` wrote; the classes of its first videos
            are shown over time.
        force: Whether an existing file may be replaced.

    Returns:
        ``output``.

    Raises:
        OutputError: ``output`` exists and ``force`` is False, or has another suffix than ``.html``.
        SelectionError: There is no selection of this version's form.
        CheckpointError: A predictions file is damaged.
        PredictionsError: Another tool's predictions file is damaged.
        ExportError: ``calibrated`` is no whole exported file.
        ProviderError: It was not calibrated, or its calibration is damaged.
        InputError: ``timeline`` is not such a file.
    """
    selection_path, output = Path(selection_path), Path(output)
    require_suffix(output, ".html")
    refuse_overwrite(output, force=force)
    selection = read_selection(selection_path)
    extras = Extras(
        None if calibrated is None else _calibration(Path(calibrated)),
        [] if timeline is None else read_timelines(Path(timeline)),
    )
    evidence = gather(selection, selection_path.parent)
    curves = training_curves(selection, selection_path.parent)
    text = render(
        selection, evidence, rows, extras, selection_name=str(selection_path), curves=curves
    )
    with written_aside(output, force=force) as aside:
        aside.write_text(text, encoding="utf-8")
    return output


@dataclass(frozen=True)
class Extras:
    """What a page shows beyond the selection.

    Attributes:
        calibration: What a calibrated file says of itself, and its method; None without one.
        timelines: The classes of some videos over time.
    """

    calibration: tuple[CalibrationFacts, str] | None = None
    timelines: Sequence[Timeline] = ()


NOTHING = Extras()


def _calibration(path: Path) -> tuple[CalibrationFacts, str]:
    calibration = Calibration.of(without_prefix(read_properties(path)), path)
    if calibration is None:
        raise ProviderError(
            f"{path} was not calibrated.",
            hint="Name a file that `ensemble-kit calibrate` wrote.",
        )
    return calibration_facts(calibration, path), calibration.method


def render(
    selection: SelectionMetadata,
    evidence: Evidence,
    rows: Sequence[Row],
    extras: Extras = NOTHING,
    *,
    selection_name: str,
    curves: Sequence[Curve] = (),
) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("ensemble_kit.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "counted": counted, "score": _score, "signed": _signed, "size": format_size,
    }  # fmt: skip
    size = size_chart(selection)
    charts = {"path": chart_json(path_chart(selection))} if len(selection.path) > 1 else {}
    if size is not None:
        charts["size"] = chart_json(size)
    if curves:
        charts["curves"] = chart_json(curves_chart(curves))
    if timed_rows(rows):
        charts["speed"] = chart_json(speed_chart(rows))
    if extras.calibration is not None:
        charts["reliability"] = chart_json(reliability_chart(extras.calibration[0].reliability))
    for place, each in enumerate(extras.timelines, 1):
        charts[f"timeline-{place}"] = chart_json(timeline_chart(each))
    return environment.get_template("page.html").render(
        bokeh=bokeh_script(),
        charts=charts,
        curves=list(zip(curve_colors(curves), (curve.name for curve in curves), strict=True)),
        colors={"blue": BLUE, "grey": GREY, "orange": ORANGE},
        dtypes=list(DTYPES),
        is_limit_beyond=size is not None and selection.max_size > size_range(selection)[1] * MIB,
        tested=_tested(rows),
        today=date.today(),
        evidence=evidence,
        extras=extras,
        fewest_positives=FEWEST_POSITIVES,
        frontier_colors=[
            (PRECISION_COLORS[dtype], f"{dtype} alone") for dtype in selection.frontiers
        ],
        kit_version=__version__,
        labels=lambda ensemble: ensemble_labels(selection, ensemble),
        noun=metric_name(selection.metric),
        rows=rows,
        seconds={row.model: row.seconds_per_video for row in rows if row.form == "averaged"},
        selection=selection,
        selection_name=selection_name,
        summary=_summary(selection),
        zip=zip,
    )


def _summary(selection: SelectionMetadata) -> dict[str, Any]:
    """Return the figures at the top: on the held-out videos, where there are any."""
    confirm = selection.confirm
    part = confirm.held_out if confirm else None
    best = selection.candidates[0]
    single = best.confirmed_score if confirm else best.score
    score = part.score if part else selection.score
    return {
        "score": score,
        "interval": part.interval if part else selection.path[-1].interval,
        "best": selection.label(best.name, best.dtype),
        "single": single,
        "gain": score - (single or 0.0),
        "videos": part.videos if part else selection.videos,
    }


def _tested(rows: Sequence[Row]) -> dict[str, Row] | None:
    """Return the exported ensemble on the records that were given, and the best single model.

    Without an exported one it is a fused one; where several average other numbers of draws, that
    with the most. None where there is no ensemble among the models, or nothing else.
    """
    ensembles = [row for row in rows if row.model == ENSEMBLE]
    singles = [row for row in rows if row.model != ENSEMBLE]
    if not ensembles or not singles:
        return None
    return {
        "ensemble": max(ensembles, key=lambda row: (row.form == "onnx", row.repeats)),
        "single": max(singles, key=lambda row: (row.gap, row.form == "averaged")),
    }


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"
