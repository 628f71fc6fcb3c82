"""ensemble-kit predict."""

import json
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ensemble_kit.choices import BATCH_SIZE, TOP_K, Dtype
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    EXISTING_FILE_OR_FOLDER,
    STDOUT,
    device_option,
    echo_json,
    echo_skipped,
    force_option,
    json_option,
    one_of,
    records_options,
    repeats_option,
    words_of,
)
from ensemble_kit.cli.side_by_side import Engine, engine_options, run_side_by_side
from ensemble_kit.wording import counted, printable

if TYPE_CHECKING:
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.engines.jobs import Job
    from ensemble_kit.shards import Shard, Share

# Options of how a model is run, which the library's functions take beside records
RUNNING = ("repeats", "batch_size", "top_k", "dtype", "device", "force")
PRINTED_TOGETHER = 2**20  # bytes of a CSV file for standard output

# What `predict --predictions` may be given besides
BLEND_TAKES = {"model", "data", "output", "is_blend", "top_k", "force", "as_json", "quiet"}


@click.command()
@click.argument("model", type=EXISTING_FILE)
@click.argument("data", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    required=True,
    help="A .safetensors file, a challenge .csv, FOLDER/ for a file for each file of records, or - "
    "to print a .csv.",
)
@click.option(
    "--shard", "share", metavar="I/N",
    help="Predict the I-th of N parts of the files of records, told apart by their names.",
)  # fmt: skip
@click.option(
    "--window", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
    help="Write the best classes of each window of so many seconds, to a .csv or .jsonl file.",
)  # fmt: skip
@click.option(
    "--stride", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
    help="Seconds from the start of a window to that of the next  [default: the window].",
)  # fmt: skip
@click.option(
    "--segments", "wants_segments", is_flag=True,
    help="Write the submission of the challenge of 2019, Class,Segments: the likeliest segments of "
    "5 seconds for each class.",
)  # fmt: skip
@click.option(
    "--rated-segments", "rated", is_flag=True,
    help="Predict the segments of 5 seconds that people have rated in DATA, each as a video named "
    "VIDEO:START, for select --metric map-at-k.",
)  # fmt: skip
@click.option(
    "--classes", type=EXISTING_FILE, metavar="FILE",
    help="Classes that --segments lists, one a line, such as the challenge's "
    "segment_label_ids.csv.  [default: all]",
)  # fmt: skip
@click.option(
    "--predictions", "is_blend", is_flag=True,
    help="Mix predictions by the coefficients of a selection: MODEL is its selection.json, DATA "
    "are FILE or NAME=FILE for each candidate.",
)  # fmt: skip
@repeats_option
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=BATCH_SIZE, show_default=True,
    help="Videos that run together; it changes memory and speed only.",
)  # fmt: skip
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help=f"Classes of each video to keep.  [default: all, {TOP_K} in a .csv]",
)
@click.option(
    "--dtype",
    type=one_of(Dtype),
    help="Round the weights of a checkpoint first, as fuse would store them.",
)
@engine_options
@device_option
@records_options
@force_option
@json_option
def predict(
    model: Path,
    data: tuple[str, ...],
    output: str,
    share: str | None,
    window: float | None,
    stride: float | None,
    wants_segments: bool,
    rated: bool,
    classes: Path | None,
    is_blend: bool,
    engine: Engine,
    as_json: bool,
    **options: Any,
) -> None:
    """Write the probabilities of MODEL on the records DATA.

    MODEL is a checkpoint, a fused file or an ONNX file. The records need no labels.

    With FOLDER/ as the output, each file of records has its own predictions file, and the same
    command resumes after a stop: what is there already is skipped. Other commands take the folder
    as one predictions file. With - as the output, the challenge's CSV is printed.

    \b
    Examples:
        ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' -o submission.csv
        ensemble-kit predict runs/gru/averaged.safetensors 'validate/*.tfrecord' --top-k 100 \\
            -o gru-100.safetensors
        ensemble-kit predict runs/gru/averaged.safetensors 'validate/*.tfrecord' --dtype int4 \\
            -o runs/gru/validation-int4.safetensors
        ensemble-kit predict ensemble/selection.json --predictions test/gru.csv test/vlad.csv \\
            -o submission.csv
        ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' -o test/ --jobs 2
        ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' --window 5 -o windows.csv
        ensemble-kit predict ensemble/ensemble.onnx 'test/*.tfrecord' --segments -o segments.csv
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    running = {name: options.pop(name) for name in RUNNING}
    if is_blend:
        top_k, force = running["top_k"], running["force"]
        _blend(model, data, Path(output), top_k=top_k, force=force, as_json=as_json)
        return
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.shards import Share

    part = None if share is None else Share.parse(share)
    is_folder = output.endswith(("/", os.sep)) or isdir(output)
    is_no_file = is_folder or output == STDOUT
    _refuse_segments(wants_segments, classes, window, is_no_file, running)
    if rated and (wants_segments or window is not None or is_no_file):
        raise click.UsageError(
            "--rated-segments writes one .safetensors file; leave out --segments and --window, and "
            "name that file."
        )
    _refuse_options(output, is_folder, part is not None or engine.is_wanted, window, stride)
    if output == STDOUT and as_json:
        raise click.UsageError("-o - prints the predictions; it cannot print --json too.")
    records = Records(data, needs_labels=False, **options)
    if engine.is_wanted:
        facts = _predict_in_jobs(model, records, Path(output), part, engine, as_json=as_json)
        if as_json:
            echo_json({"path": Path(output), **facts})
        return
    text, facts = output, dict[str, int]()
    if output == STDOUT:
        _print_csv(model, records, running)
    elif wants_segments:
        from ensemble_kit.timeline import predict_segments

        del running["top_k"]
        predict_segments(model, records, output, classes_path=classes, **running)
    elif rated:
        from ensemble_kit.timeline import predict_rated_segments

        predict_rated_segments(model, records, output, **running)
    elif is_folder:
        text, facts = _predict_folder(model, records, output, part, running)
    else:
        _predict_file(model, records, output, window, stride, running)
    if as_json:
        echo_json({"path": Path(output), "skipped": records.num_skipped, **facts})
        return
    if output != STDOUT:
        click.echo(text)
    echo_skipped(records)


def _refuse_segments(
    wants_segments: bool,
    classes: Path | None,
    window: float | None,
    is_no_file: bool,
    running: dict[str, Any],
) -> None:
    """Raise a usage error where options do not go with --segments, or need it."""
    if classes is not None and not wants_segments:
        raise click.UsageError("--classes says what --segments lists; give --segments too.")
    if wants_segments and (window is not None or running["top_k"] is not None or is_no_file):
        raise click.UsageError(
            "--segments writes one .csv file of windows of 5 seconds; leave out --window and "
            "--top-k, and name that file."
        )


def _refuse_options(
    output: str, is_folder: bool, writes_parts: bool, window: float | None, stride: float | None
) -> None:
    """Raise a usage error where options do not go with the output, or with each other."""
    if not is_folder and writes_parts:
        raise click.UsageError(
            "--shard, --jobs and --on write a file for each file of records; name a folder, such "
            "as -o predictions/."
        )
    if stride is not None and window is None:
        raise click.UsageError("--stride moves windows; give --window too.")
    if window is not None and (is_folder or output == STDOUT):
        raise click.UsageError("--window writes one file; name a .csv or .jsonl file.")


def _predict_in_jobs(
    model: Path,
    records: "Records",
    folder: Path,
    part: "Share | None",
    engine: Engine,
    *,
    as_json: bool,
) -> dict[str, int]:
    """Predict the shards of a part in several jobs, and return the sums of what they count."""
    from ensemble_kit.predictions.folder import list_files
    from ensemble_kit.shards import find_shards, shared_out

    everything = find_shards(records, folder)
    list_files(folder, [shard.output.name for shard in everything])
    shards = [shard for shard in everything if part is None or part.has(shard.name)]
    words = words_of(click.get_current_context(), leave_out={*Engine._fields, "share"})
    printed: list[str] = []
    run_side_by_side(
        _jobs(model, shared_out(shards, engine.jobs or len(shards) or 1), words),
        engine,
        folders=[folder],
        on_printed=printed.append if as_json else None,
    )
    return _sums(printed)


def _predict_folder(
    model: Path, records: "Records", folder: str, part: "Share | None", running: dict[str, Any]
) -> tuple[str, dict[str, int]]:
    """Predict a file for each file of records; return what was done, as text and as numbers."""
    from ensemble_kit.shards import predict_shards

    done = predict_shards(model, records, folder, share=part, **running)
    files = counted(done.num_predicted, "file")
    text = f"{done.folder}: {files} predicted, {done.num_skipped:,} already there"
    return text, {"predicted": done.num_predicted, "already_there": done.num_skipped}


def _predict_file(
    model: Path,
    records: "Records",
    output: str,
    window: float | None,
    stride: float | None,
    running: dict[str, Any],
) -> None:
    from ensemble_kit.inference import predict as predict_records
    from ensemble_kit.timeline import predict_windows

    if window is None:
        predict_records(model, records, output, **running)
    else:
        predict_windows(model, records, output, window=window, stride=stride, **running)


def _print_csv(model: Path, records: "Records", running: dict[str, Any]) -> None:
    from ensemble_kit.inference import predict as predict_records

    with tempfile.TemporaryDirectory() as folder:
        written = predict_records(model, records, Path(folder, "stdout.csv"), **running)
        with written.open("rb") as file:
            for block in iter(partial(file.read, PRINTED_TOGETHER), b""):
                click.echo(block, nl=False)  # its errors are known for those of standard output


def _blend(
    selection: Path,
    sources: Sequence[str],
    output: Path,
    *,
    top_k: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Mix other predictions of a selection's members."""
    from ensemble_kit.predictions.blending import blend

    context = click.get_current_context()
    for option in context.command.params:
        if (
            context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
            and option.name not in BLEND_TAKES
        ):
            raise click.UsageError(
                f"{option.opts[0]} does not go with --predictions, which reads no records."
            )
    named = [_named_source(source) for source in sources]
    blended = blend(selection, named, output, top_k=top_k, force=force)
    if as_json:
        echo_json(blended)
        return
    shares = ", ".join(f"{name} {share:.4g}" for name, share in blended.coefficients.items())
    click.echo(printable(f"{output}: {counted(blended.num_videos, 'video')}, mixed of {shares}"))
    if blended.unused:
        click.echo(printable(f"No members, so not used: {', '.join(blended.unused)}."), err=True)


def _named_source(text: str) -> tuple[str | None, Path]:
    """Read ``FILE`` or ``NAME=FILE``; a file whose own name has a ``=`` is a file."""
    name, equals, path = text.partition("=")
    if equals and not os.path.exists(text):
        return name, EXISTING_FILE_OR_FOLDER.convert(path, None, None)
    return None, EXISTING_FILE_OR_FOLDER.convert(text, None, None)


def _sums(printed: Sequence[str]) -> dict[str, int]:
    """Return the sums of what jobs have printed as JSON."""
    facts = [json.loads(text) for text in printed]
    return {
        name: sum(each[name] for each in facts)
        for name in ("skipped", "predicted", "already_there")
    }


def _jobs(model: Path, parts: Sequence[Sequence["Shard"]], words: Sequence[str]) -> list["Job"]:
    """Return a job for each part of the shards."""
    from ensemble_kit.engines.jobs import Job

    return [
        Job(
            f"part {number} of {len(parts)}",
            ("predict", *words, "--", str(model.absolute()), *(shard.place for shard in part)),
        )
        for number, part in enumerate(parts, start=1)
    ]
