"""ensemble-kit calibrate."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import CALIBRATION_METHOD, CalibrationMethod
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    EXISTING_FILE_OR_FOLDER,
    FILE,
    force_option,
    json_option,
    one_of,
)
from ensemble_kit.wording import counted, printable

if TYPE_CHECKING:
    from ensemble_kit.calibration.stage import CalibratedFile

SHOWN_LEVELS = (0.5, 0.8, 0.9, 0.95)


@click.command()
@click.argument("model", type=EXISTING_FILE)
@click.argument("predictions", type=EXISTING_FILE_OR_FOLDER)
@click.option("-o", "--output", type=FILE, required=True, help="ONNX file to write.")
@click.option("--labels", type=EXISTING_FILE, help="CSV file of the videos' labels.")
@click.option(
    "--method",
    type=one_of(CalibrationMethod),
    default=CALIBRATION_METHOD,
    show_default=True,
    help="How to calibrate; none adds thresholds alone, and auto takes the method with the lowest "
    "cross-entropy on the other half.",
)
@force_option
@json_option
def calibrate(
    model: Path,
    predictions: Path,
    output: Path,
    labels: Path | None,
    method: CalibrationMethod,
    force: bool,
    as_json: bool,
) -> None:
    """Add calibrated probabilities and thresholds for tags to an exported MODEL.

    PREDICTIONS are those of MODEL on videos that it was not trained on. Half of them are fitted on
    and half measured on. The graph and its probabilities stay as they are: OnnxEnsemble.tags() in
    Python applies what is added.

    \b
    Examples:
        ensemble-kit predict ensemble/ensemble.onnx 'validate/*.tfrecord' -o p.safetensors
        ensemble-kit calibrate ensemble/ensemble.onnx p.safetensors -o ensemble/calibrated.onnx
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.calibration.stage import calibrate as calibrate_file

    done = calibrate_file(
        model, predictions, output=output, labels_path=labels, method=method, force=force
    )
    if as_json:
        click.echo(json.dumps({"method": done.calibration.method, **done.calibration.measured}))
        return
    for line in _summary(done):
        click.echo(printable(line))


def _summary(done: "CalibratedFile") -> list[str]:
    measured: Any = done.calibration.measured
    error, gap, best = (measured[key] for key in ("expected_calibration_error", "gap", "best_f1"))
    lines = [
        f"{done.path}: calibrated by {done.calibration.method} on "
        f"{counted(measured['videos'], 'video')}. On the half that it was not fitted on:",
        f"  expected calibration error  {error['before']:.5f} -> {error['after']:.5f}",
        f"  GAP                         {gap['before']:.4f} -> {gap['after']:.4f}",
        "",
        "  tags wished for    precision  recall      tags",
    ]
    rows = [
        (f"precision of {level['min_precision']:g}", level)
        for level in measured["levels"]
        if level["min_precision"] in SHOWN_LEVELS
    ]
    for name, level in [*rows, ("best F1", best)]:
        precision = "none" if level["precision"] is None else f"{level['precision']:.4f}"
        lines.append(f"  {name:<17}  {precision:>9}  {level['recall']:.4f}  {level['tags']:>8,}")
    return lines
