"""ensemble-kit select."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import (
    AUTO,
    BEAM_WIDTH,
    CONFIDENCE,
    CRITERION,
    DTYPE,
    DTYPES_OF_AUTO,
    ENOUGH_VIDEOS,
    HELD_OUT_SHARE,
    MAX_SIZE,
    METRIC,
    MIXING,
    MOST_EXACT,
    RESAMPLES,
    SEED,
    TOP_K,
    Criterion,
    Metric,
    Mixing,
    Strategy,
)
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    EXISTING_FILE_OR_FOLDER,
    FILE,
    echo_csv,
    force_option,
    one_of,
    parse_dtypes,
    table_options,
)
from ensemble_kit.errors import EnsembleKitError, SelectionError, SizeLimitError
from ensemble_kit.files import format_of_limit, parse_size, refuse_overwrite
from ensemble_kit.store.workspace import REPORT, SELECTION
from ensemble_kit.wording import counted, metric_name, printable, printable_line

if TYPE_CHECKING:
    from ensemble_kit.store.selection_file import (
        OptimisedMetadata,
        SelectionMetadata,
        TruncationMetadata,
    )


@click.command()
@click.argument("predictions", nargs=-1, type=EXISTING_FILE_OR_FOLDER)
@click.option(
    "-o", "--output", type=FILE, default=SELECTION, show_default=True, help="File to write."
)
@click.option(
    "--max-size",
    metavar="SIZE",
    help="Maximum size of all members together: 1GiB, 1GB, 995MiB ...  "
    f"[default: {MAX_SIZE // 2**30}GiB]",
)
@click.option(
    "--dtype",
    default=DTYPE,
    show_default=True,
    metavar="DTYPE",
    help="Precision that members will be stored in; several, as in "
    f"{','.join(DTYPES_OF_AUTO)}, of which the best is chosen for each; or {AUTO}, those that "
    "predictions were measured in.",
)
@click.option(
    "--metric",
    type=one_of(Metric),
    default=METRIC,
    show_default=True,
    help="What members are chosen by: GAP, the challenge's mAP over each video's best classes, or "
    "macro-map, AudioSet's mAP over whole rankings; map-at-k, the MAP of segments of the challenge "
    "of 2019.",
)
@click.option(
    "--ratings", multiple=True, metavar="GLOB",
    help="Records that hold the ratings of segments, for --metric map-at-k.",
)  # fmt: skip
@click.option(
    "--mixing",
    type=one_of(Mixing),
    default=MIXING,
    show_default=True,
    help="Mixing coefficients: equal, proportional to each member's own score by the metric, or "
    "optimised.",
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="NAME=X",
    help="Coefficient of a member, in place of a search; given for each member, they sum to 1.",
)
@click.option(
    "--strategy",
    type=one_of(Strategy),
    help="How to search for members; replacement is greedy and may add a member again.  [default: "
    f"exhaustive, the exact best, with up to {MOST_EXACT} candidates, else greedy]",
)
@click.option(
    "--criterion",
    type=one_of(Criterion),
    default=CRITERION,
    show_default=True,
    help="What an addition is chosen by: its gain, or its gain for each byte.",
)
@click.option("--max-members", type=click.IntRange(min=1), help="Maximum number of members.")
@click.option(
    "--beam-width",
    type=click.IntRange(min=1),
    default=BEAM_WIDTH,
    show_default=True,
    help="Number of ensembles that a beam search follows.",
)
@click.option(
    "--start", multiple=True, metavar="NAME", help="Start with this member; may be repeated."
)
@click.option("--exclude", multiple=True, metavar="NAME", help="Leave out; may be repeated.")
@click.option(
    "--confirm",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of the videos to hold out and confirm the choice on.  "
    f"[default: {HELD_OUT_SHARE}, or 0 with fewer than {ENOUGH_VIDEOS:,} videos]",
)
@click.option(
    "--resamples",
    type=click.IntRange(min=0),
    default=RESAMPLES,
    show_default=True,
    help=f"Number of bootstrap resamples for {100 * CONFIDENCE:g} % intervals; 0 for none.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=SEED,
    show_default=True,
    help="Seed of the resamples.",
)
@click.option(
    "--labels", type=EXISTING_FILE, help="CSV file of the videos' labels: VideoId,Labels."
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=TOP_K,
    show_default=True,
    help="Number of classes of each video that GAP and the challenge's mAP count.",
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of a candidate whose size is not known, by its file's name without the suffix; may "
    "be repeated.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Memory for what is kept of the candidates: 8GiB ...; the rest lies in a temporary file, "
    "in TMPDIR where that is set, else beside the output.  [default: half of the machine's]",
)
@click.option("--intersect", is_flag=True, help="Leave out videos that some file lacks.")
@click.option(
    "--report", "wants_report", is_flag=True, help=f"Also write {REPORT.name} beside the selection."
)
@force_option
@table_options
def select(
    predictions: tuple[Path, ...],
    output: Path,
    max_size: str | None,
    memory: str | None,
    dtype: str,
    labels: Path | None,
    sizes: tuple[str, ...],
    weights: tuple[str, ...],
    ratings: tuple[str, ...],
    wants_report: bool,
    force: bool,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Choose the members of an ensemble by validation GAP or mAP, under a size limit.

    PREDICTIONS are runs/*/validation.safetensors unless named; they may also be CSV files in the
    challenge's format, .npy or .npz. Each step shows the score on the videos that members are
    chosen on, the score on the held-out videos, and a 95 % interval of the gain.

    \b
    Examples:
        ensemble-kit select
        ensemble-kit select --max-size 500MB --mixing gap --report
        ensemble-kit select --max-size 100MB --dtype auto
        ensemble-kit select --metric macro-map
        ensemble-kit select segments/*.safetensors --metric map-at-k --ratings 'validate/*.tfrecord'
        ensemble-kit select --strategy beam --beam-width 4 --start nonlocal-gru --max-members 6
        ensemble-kit select --criterion gain-per-byte --exclude poor --confirm 0.3
        ensemble-kit select --weight gru=0.4 --weight vlad=0.6
        ensemble-kit select A.csv B.csv --labels Y.csv --size A=4MB --size B=7MB --max-size 10MB
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.selection.stage import find_predictions
    from ensemble_kit.selection.stage import select as select_members

    page = output.with_name(REPORT.name)
    if wants_report:
        refuse_overwrite(page, force=force)  # before the work
    limit = None if max_size is None else parse_size(max_size)
    precisions: Any = dtype if dtype == AUTO else parse_dtypes(dtype, "--dtype", or_auto=True)
    selection = select_members(
        predictions or find_predictions(precisions),
        dtype=precisions,
        output=output,
        max_size=limit,
        memory=None if memory is None else parse_size(memory),
        labels_path=labels,
        sizes=_named_sizes(sizes),
        coefficients=_named_coefficients(weights),
        ratings=Records(ratings, needs_labels=False) if ratings else None,
        force=force,
        keep_same=wants_report,  # this command may have been stopped before it wrote the page
        **options,
    )
    if wants_report:
        from ensemble_kit.report.page import write_report

        write_report(output, page, force=force)
    if as_json:
        click.echo(selection.model_dump_json())
        return
    if as_csv:
        echo_csv(_rows(selection))
        return
    for line in [*_table(selection), *_summary(selection, output, limit or selection.max_size)]:
        click.echo(printable(line))
    if wants_report:
        click.echo(printable(f"{page}: open it in a browser."))


def _rows(selection: "SelectionMetadata") -> Iterator[dict[str, object]]:
    """Yield the path with all columns that a selection may have."""
    for number, step in enumerate(selection.path, start=1):
        low, high = step.gain_interval or (None, None)
        yield {
            "step": number, "added": step.added, "dtype": step.dtype, "score": step.score,
            "gain": step.gain, "confirmed_score": step.confirmed_score,
            "confirmed_gain": step.confirmed_gain, "gain_low": low, "gain_high": high,
            "bytes": step.bytes,
        }  # fmt: skip


def _table(selection: "SelectionMetadata") -> list[str]:
    """Return the path as aligned lines: names to the left, numbers to the right."""
    has_sizes = any(candidate.bytes for candidate in selection.candidates)
    header = ["step", "added", selection.metric_name, "gain"]
    header += ["held out"] if selection.confirm else []
    header += [f"{_level(selection)} of gain "] if selection.bootstrap.resamples else []
    rows = [[*header, "bytes", "limit"] if has_sizes else header]
    for number, step in enumerate(selection.path, start=1):
        added = printable_line(selection.label(step.added, step.dtype))
        row = [str(number), added, f"{step.score:.4f}", f"{step.gain:+.4f}"]
        if step.confirmed_score is not None:
            row.append(f"{step.confirmed_score:.4f}")
        if step.gain_interval is not None:
            mark = " " if step.is_distinguishable else "~"
            row.append("{:+.4f} {:+.4f}".format(*step.gain_interval) + mark)
        if has_sizes:
            row += [f"{step.bytes:,}", f"{step.bytes / selection.max_size:.1%}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _summary(selection: "SelectionMetadata", output: Path, limit: int) -> Iterator[str]:
    """Say in a few sentences what was chosen, and how far it can be trusted."""
    yield (
        f"{output}: {len(selection.members)} of "
        f"{counted(len(selection.candidates), 'candidate')}, "
        f"{selection.metric_name} {selection.score:.4f}{_size(selection, limit)}."
    )
    if selection.search.strategy == "given":
        yield selection.rule
    if selection.search.greedy_score is not None:
        yield _greedy(selection)
    if selection.left_out:
        left_out = counted(selection.left_out, "video")
        yield f"{left_out} that some file lacks {_was(selection.left_out)} left out."
    noisy = [step.added for step in selection.path if step.is_distinguishable is False]
    if noisy:
        yield f"~ What {', '.join(noisy)} added cannot be told from noise."
    if selection.confirm:
        chosen, held = selection.confirm.chosen_by, selection.confirm.held_out
        metric = metric_name(selection.metric)
        interval = ""
        if held.interval:
            interval = ", {} interval {:.4f} to {:.4f}".format(_level(selection), *held.interval)
        yield (
            f"Chosen on {counted(chosen.videos, 'video')} ({metric} {chosen.score:.4f}), confirmed "
            f"on {counted(held.videos, 'other')} ({metric} {held.score:.4f}{interval})."
        )
    if selection.optimised:
        yield _optimised(selection.optimised, metric_name(selection.metric))
    if selection.truncation:
        yield _truncation(selection.truncation, is_chosen=selection.search.strategy != "given")


def _level(selection: "SelectionMetadata") -> str:
    """Return the share of resamples within its intervals, as text."""
    return f"{100 * selection.bootstrap.level:g} %"


def _greedy(selection: "SelectionMetadata") -> str:
    """Say how far greedy search is from the choice, and whether the choice is the exact best."""
    search, chosen = selection.search, [step.added for step in selection.path]
    text = "Greedy search would choose "
    if search.strategy == "exhaustive":
        number = counted(search.evaluations, "ensemble")
        text = f"No ensemble that fits is better ({number} measured); greedy search would choose "
    if sorted(search.greedy_path or ()) == sorted(chosen):
        return f"{text}the same members."
    greedy_score = search.greedy_score or 0.0
    distance = f"{selection.path[-1].score - greedy_score:.4f} less"
    names = ", ".join(search.greedy_path or ())
    return f"{text}{names}, with {selection.metric_name} {greedy_score:.4f}, {distance}."


def _size(selection: "SelectionMetadata", limit: int) -> str:
    """Say what the members take, or which sizes nobody knows."""
    unknown = [member.name for member in selection.members if not member.bytes]
    if len(unknown) == len(selection.members):
        return ", of unknown size"
    size = f", {format_of_limit(selection.bytes, limit)}"
    without = f" without {', '.join(unknown)}, of unknown size" if unknown else ""
    precisions = f" in {selection.precisions}" if selection.precisions else ""
    return f"{size}{precisions}{without}"


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _optimised(optimised: "OptimisedMetadata", metric: str) -> str:
    """Say what optimised coefficients gained, and on the held-out videos too."""
    text = (
        f"Optimised coefficients changed the {metric} from {optimised.uniform_score:.4f} to "
        f"{optimised.score:.4f}"
    )
    if optimised.confirmed_score is None:
        return f"{text}."
    return (
        f"{text}, and on the held-out videos from {optimised.confirmed_uniform_score:.4f} to "
        f"{optimised.confirmed_score:.4f}."
    )


def _truncation(truncation: "TruncationMetadata", *, is_chosen: bool) -> str:
    """Say what the classes that some files left out could change."""
    conclusion = {
        True: "the same members would be chosen",
        False: "other members might be chosen",
        None: "these bounds do not say whether other members would be chosen",
    }
    return (
        f"{', '.join(truncation.candidates)} left out classes. Whatever their probabilities are, "
        "the GAP of the members is from {:.4f} to {:.4f}".format(*truncation.score_bounds)
        + (f", and {conclusion[truncation.is_decided]}." if is_chosen else ".")
    )


def _named_sizes(texts: Sequence[str]) -> dict[str, int]:
    hint = "Write NAME=SIZE once for each candidate: --size gru=4MB."
    sizes = _named(texts, "size", lambda problem: SizeLimitError(problem, hint=hint))
    return {name: parse_size(size) for name, size in sizes.items()}


def _named_coefficients(texts: Sequence[str]) -> dict[str, float] | None:
    hint = "Write NAME=X once for each member: --weight gru=0.4 --weight vlad=0.6."
    coefficients = {}
    for name, text in _named(
        texts, "coefficient", lambda problem: SelectionError(problem, hint=hint)
    ).items():
        try:
            coefficients[name] = float(text)
        except ValueError as error:
            raise SelectionError(
                f"The coefficient of {name} is {text!r}, not a number.", hint=hint
            ) from error
    return coefficients or None


def _named(
    texts: Sequence[str], noun: str, error: Callable[[str], EnsembleKitError]
) -> dict[str, str]:
    """Return the value of each name that options of the form NAME=VALUE give."""
    values: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.rpartition("=")
        if not equals or name in values:
            raise error(
                f"{text!r} is "
                f"{f'a second {noun} of {name}' if equals else f'not a name and a {noun}'}."
            )
        values[name] = value
    return values
