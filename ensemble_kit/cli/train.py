"""ensemble-kit train."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import PRECISION, TEACHER_SHARE, Precision
from ensemble_kit.cli.options import (
    EXISTING_FILE,
    FOLDER,
    device_option,
    echo_skipped,
    force_option,
    one_of,
    records_options,
    words_of,
)
from ensemble_kit.store.workspace import RUNS

if TYPE_CHECKING:
    from ensemble_kit.engines.jobs import Job, JobEnd
    from ensemble_kit.pipeline import FinishedRun


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...")
@click.option("--ensemble", metavar="NAME", help="Train the members of this published ensemble.")
@click.option(
    "--train", "training", multiple=True, required=True, metavar="GLOB", help="Training records."
)
@click.option("--validation", multiple=True, metavar="GLOB", help="Validation records.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a value of the recipe."
)
@click.option("--name", metavar="NAME", help="The run's name, in place of the recipe's.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Processes that read records ahead, about 50 MB each; 0 reads while nothing trains.",
)
@click.option(
    "--ema",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="DECAY",
    help="Keep a moving average of the weights too, such as 0.999.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N checkpoints without a better validation GAP.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Last checkpoints kept, beside the best  [default: those that are averaged].",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Take each batch in N parts, where memory is short.",
)
@click.option(
    "--precision",
    type=one_of(Precision),
    default=PRECISION,
    show_default=True,
    help="bf16 multiplies in bfloat16; weights and loss stay in float32.",
)
@click.option("--compile", "compiled", is_flag=True, help="Compile the model with torch.compile.")
@click.option(
    "--teacher",
    type=EXISTING_FILE,
    help="Predictions of the training records, which the sub-model learns from too.",
)
@click.option(
    "--teacher-share",
    type=click.FloatRange(min=0, max=1),
    default=TEACHER_SHARE,
    show_default=True,
    help="What the teacher counts; the labels count the rest.",
)
@click.option("-o", "--output", type=FOLDER, default=RUNS, show_default=True, help="Runs' folder.")
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N",
    help="Train N recipes at a time, each in a process of its own.",
)  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Write the log for TensorBoard too.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
@device_option
@records_options
@force_option
def train(
    recipes: tuple[str, ...],
    ensemble: str | None,
    training: tuple[str, ...],
    validation: tuple[str, ...],
    overrides: tuple[str, ...],
    name: str | None,
    seed: int,
    workers: int,
    ema: float | None,
    patience: int | None,
    keep: int | None,
    accumulate: int,
    precision: Precision,
    compiled: bool,
    teacher: Path | None,
    teacher_share: float,
    output: Path,
    device: str,
    jobs: int | None,
    tensorboard: bool,
    quiet: bool,
    force: bool,
    **reading: Any,
) -> None:
    """Train each RECIPE on records, average its checkpoints, predict the validation records.

    A RECIPE is a name that `ensemble-kit recipes list` shows, or a .toml file. A run that was
    stopped or killed goes on with the same command, and one that is finished is left as it is.
    Under torchrun several processes train each run together, on one machine or on many.

    \b
    Example:
        ensemble-kit train willow/gated-net-vlad willow/gru \\
            --train 'train/*.tfrecord' --validation 'validate/*.tfrecord' --jobs 2
        torchrun --nproc-per-node 8 -m ensemble_kit train willow/gated-net-vlad --device cuda \\
            --train 'train/*.tfrecord' --validation 'validate/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.engines.jobs import Job
    from ensemble_kit.pipeline import finish_run
    from ensemble_kit.progress import quietly
    from ensemble_kit.recipes.reading import load_recipe
    from ensemble_kit.store.workspace import run_name
    from ensemble_kit.training.plan import RunPlan
    from ensemble_kit.training.processes import num_processes

    if quiet:
        click.get_current_context().with_resource(quietly())
    recipes = _named(recipes, ensemble)
    if jobs is not None and num_processes() > 1:
        raise click.UsageError("--jobs starts processes itself; leave it or torchrun out.")
    if name is not None and len(recipes) > 1:
        raise click.UsageError("--name names one run; give one RECIPE with it.")
    loaded = [load_recipe(recipe, overrides) for recipe in recipes]
    folders = [output / (name or run_name(recipe.name)) for recipe in loaded]
    for folder in folders:
        if folders.count(folder) > 1:
            raise click.UsageError(
                f"Two recipes would make the run {folder}; train one by itself, with --name."
            )
    training_records = Records(training, **reading)
    validation_records = Records(validation, **reading) if validation else None
    plans = [
        RunPlan(
            recipe=recipe,
            training=training_records,
            validation=validation_records,
            folder=folder,
            seed=seed,
            workers=workers,
            device=device,
            tensorboard=tensorboard,
            ema=ema,
            patience=patience,
            keep=keep,
            accumulate=accumulate,
            precision=precision,
            compiled=compiled,
            teacher=teacher,
            teacher_share=teacher_share,
        )
        for recipe, folder in zip(loaded, folders, strict=True)
    ]
    for plan in plans:  # before hours are spent on another
        plan.find(force=force)
    if jobs is not None:
        words = words_of(click.get_current_context(), leave_out={"jobs", "ensemble"})
        _train_side_by_side(
            [
                Job(folder.name, ("train", *words, "--", recipe))
                for folder, recipe in zip(folders, recipes, strict=True)
            ],
            at_once=min(jobs, len(recipes)),
        )
        return
    for plan in plans:
        finished = finish_run(plan, force=force)
        if finished.trained.is_stopped:
            click.echo(_describe_stop(plan.folder, finished.trained.steps), err=True)
            raise click.exceptions.Exit(130)
        if finished.averaged is not None:  # else another process of torchrun's says it
            click.echo(_describe(finished, plan.recipe.training.max_steps))
    echo_skipped(training_records, *filter(None, [validation_records]))


def _named(recipes: Sequence[str], ensemble: str | None) -> tuple[str, ...]:
    """Return the recipes that are given by name, then those of an ensemble that are not yet."""
    from ensemble_kit.recipes.ensembles import load_ensemble

    members = load_ensemble(ensemble).named_members() if ensemble is not None else []
    if not recipes and not members:
        raise click.UsageError("Give a RECIPE, or --ensemble NAME.")
    return tuple(dict.fromkeys([*recipes, *members]))


def _train_side_by_side(jobs: Sequence["Job"], *, at_once: int) -> None:
    from ensemble_kit.engines.jobs import require_finished, run_jobs, start_process, threads_each

    start = partial(start_process, threads=threads_each(at_once))
    ends = run_jobs(jobs, start, at_once=at_once, on_end=_echo_end)
    stopped = [end.job.name for end in ends if end.state == "stopped"]
    if stopped:
        click.echo(f"Stopped; the same command goes on with: {', '.join(stopped)}.", err=True)
    require_finished(ends)
    if stopped:
        raise click.exceptions.Exit(130)


def _echo_end(end: "JobEnd") -> None:
    click.echo(end.printed, nl=False)
    if end.state == "failed":
        click.echo(f"{end.job.name}: failed: {end.problem}", err=True)


def _describe(finished: "FinishedRun", max_steps: int) -> str:
    run = finished.trained
    done = "was finished already: " if run.was_finished else ""
    of = f" of {max_steps}" if run.steps < max_steps else ""  # its patience was over
    line = f"{run.folder.path}: {done}{run.steps}{of} steps in {run.seconds:.1f} s"
    if finished.averaged_gap is not None:
        line += f", GAP@20 {run.best_gap:.4f} at best"
        line += f", {finished.averaged_gap:.4f} of {finished.averaged}"
    return line


def _describe_stop(folder: Path, steps: int) -> str:
    if not steps:
        return f"{folder}: stopped before its first step."
    return (
        f"{folder}: stopped at step {steps}; the same command goes on from there.\n"
        f"Use what there is with `ensemble-kit average {folder}`."
    )
