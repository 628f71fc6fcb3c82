"""ensemble-kit train."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ensemble_kit.choices import (
    ACCUMULATE,
    BLOCK_DTYPES,
    DEVICE,
    PRECISION,
    SEED,
    TEACHER_SHARE,
    WORKERS,
    Dtype,
    Precision,
    Tracker,
)
from ensemble_kit.cli.options import (
    EXISTING_FILE_OR_FOLDER,
    FOLDER,
    complete_recipes,
    device_option,
    echo_json,
    echo_skipped,
    force_option,
    one_of,
    parse_dtypes,
    records_options,
    words_of,
)
from ensemble_kit.cli.side_by_side import Engine, engine_options, run_side_by_side
from ensemble_kit.interrupts import INTERRUPTED
from ensemble_kit.store.workspace import RUNS
from ensemble_kit.wording import counted

if TYPE_CHECKING:
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.data.folds import Fold
    from ensemble_kit.engines.jobs import Job
    from ensemble_kit.pipeline import FinishedRun
    from ensemble_kit.recipes.reading import AnyRecipe
    from ensemble_kit.training.plan import RunPlan


@click.command()
@click.argument("recipes", nargs=-1, metavar="[RECIPE]...", shell_complete=complete_recipes)
@click.option("--ensemble", metavar="NAME", help="Train the members of this published ensemble.")
@click.option(
    "--train", "training", multiple=True, required=True, metavar="GLOB", help="Training records."
)
@click.option("--validation", multiple=True, metavar="GLOB", help="Validation records.")
@click.option(
    "--fold",
    "fold_text",
    metavar="I/N",
    help="Hold out the I-th of N folds of the training records, by a hash of their ids, as "
    "validation records. The run is NAME-fold-I-of-N.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="[RECIPE:]KEY=VALUE",
    help="Set a value of the recipes that have the key, or of one RECIPE.",
)
@click.option("--name", metavar="NAME", help="Name of the run, instead of the recipe's.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=SEED, show_default=True,
    help="Seed of the first weights, of the order of videos and of the frames drawn.",
)  # fmt: skip
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=WORKERS,
    show_default=True,
    help="Processes that read records ahead, about 50 MB each; 0 reads between steps.",
)
@click.option(
    "--ema",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="DECAY",
    help="Also keep a moving average of the weights, with this decay, such as 0.999.",
)
@click.option(
    "--patience",
    type=click.IntRange(min=1),
    metavar="N",
    help="Stop after N checkpoints in a row without a better validation GAP.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Keep the last N checkpoints and the best one  [default: as many as are averaged].",
)
@click.option(
    "--accumulate",
    type=click.IntRange(min=1),
    default=ACCUMULATE,
    show_default=True,
    metavar="N",
    help="Split each batch into N parts to save memory; their gradients are added up.",
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
    type=EXISTING_FILE_OR_FOLDER,
    help="Predictions of the training records, to learn from as well as the labels.",
)
@click.option(
    "--teacher-share",
    type=click.FloatRange(min=0, max=1),
    default=TEACHER_SHARE,
    show_default=True,
    help="The teacher's share of the targets; the labels have the rest.",
)
@click.option(
    "--predict-dtype",
    metavar="DTYPES",
    help="Also predict the validation records in these precisions, as in "
    f"{','.join(BLOCK_DTYPES)}, for select --dtype auto.",
)
@click.option(
    "-o", "--output", type=FOLDER, default=RUNS, show_default=True, help="Folder of the runs."
)
@click.option(
    "--index", type=click.IntRange(min=1), metavar="I",
    help="Train the I-th of the recipes only, as one task of a job array.",
)  # fmt: skip
@engine_options
@click.option(
    "--tracker", "trackers", type=one_of(Tracker), multiple=True,
    help="Also log to this tracker; give it once for each.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each run.")
@device_option
@records_options
@force_option
def train(
    recipes: tuple[str, ...],
    ensemble: str | None,
    training: tuple[str, ...],
    validation: tuple[str, ...],
    fold_text: str | None,
    overrides: tuple[str, ...],
    name: str | None,
    output: Path,
    predict_dtype: str | None,
    index: int | None,
    engine: Engine,
    as_json: bool,
    force: bool,
    **options: Any,
) -> None:
    """Train each RECIPE on records, average its checkpoints, predict the validation records.

    A RECIPE is a name that `ensemble-kit recipes list` shows, or a .toml file. The same command
    resumes a run that was stopped or killed, and leaves a finished one as it is. Under torchrun,
    several processes train each run together, on one machine or on many.

    Ctrl-C, SIGUSR1, SIGTERM and SIGHUP write a checkpoint first, and the exit code is 130.

    \b
    Example:
        ensemble-kit train willow/gated-net-vlad willow/gru \\
            --train 'train/*.tfrecord' --validation 'validate/*.tfrecord' --jobs 2
        ensemble-kit train willow/gru --train 'train/*.tfrecord' --fold 1/5 -o folds
        torchrun --nproc-per-node 8 -m ensemble_kit train willow/gated-net-vlad --device cuda \\
            --train 'train/*.tfrecord' --validation 'validate/*.tfrecord'
    """  # noqa: D301 - \b is click's mark for "keep these lines"
    from ensemble_kit.data.folds import Fold
    from ensemble_kit.recipes.reading import load_recipes

    recipes = _named(recipes, ensemble)
    dtypes = () if predict_dtype is None else parse_dtypes(predict_dtype, "--predict-dtype")
    if fold_text is not None and validation:
        raise click.UsageError("--fold takes validation records from --train; leave one out.")
    fold = None if fold_text is None else Fold.parse(fold_text)
    if dtypes and not validation and fold is None:
        raise click.UsageError("--predict-dtype predicts validation records; name --validation.")
    _refuse_torchrun(engine)
    if name is not None and len(recipes) > 1:
        raise click.UsageError("--name names one run; give one RECIPE with it.")
    loaded = load_recipes(recipes, overrides)
    if index is not None:
        _require_index(index, recipes)
        recipes, loaded = recipes[index - 1 : index], loaded[index - 1 : index]
    folders = _folders(loaded, name, fold, output)
    if engine.on is not None:
        options["device"] = DEVICE  # jobs find on their machines what this one may lack
    records, plans = _planned(loaded, folders, training, validation, fold, options)
    # A run that cannot be trained is refused before hours are spent on another one. The first is
    # looked at when it is trained; the others then again, under their locks.
    for plan in plans if engine.is_wanted else plans[1:]:
        plan.find_state(force=force)
    if engine.is_wanted:
        run_side_by_side(_jobs(plans, recipes), engine, folders=folders)
        return
    for plan in plans:
        _train_one(plan, dtypes, force=force, as_json=as_json)
    echo_skipped(*records)


def _refuse_torchrun(engine: Engine) -> None:
    """Raise a usage error where both torchrun and this command would start processes."""
    from ensemble_kit.training.processes import num_processes

    if engine.is_wanted and num_processes() > 1:
        word = "--jobs" if engine.on is None else "--on"
        raise click.UsageError(f"{word} starts processes itself; leave it or torchrun out.")


def _folders(
    recipes: "Sequence[AnyRecipe]", name: str | None, fold: "Fold | None", output: Path
) -> list[Path]:
    """Return the folder of each recipe's run, or raise a usage error if two are the same."""
    from ensemble_kit.store.workspace import check_run_name, fold_run_name, run_name

    if name is not None:
        check_run_name(name)  # before it is joined to a folder, where ../x would lead out of it
    names = [name or run_name(recipe.name) for recipe in recipes]
    folders = [output / (each if fold is None else fold_run_name(each, fold)) for each in names]
    for folder in folders:
        if folders.count(folder) > 1:
            raise click.UsageError(
                f"Two recipes would make the run {folder}; train one by itself, with --name."
            )
    return folders


def _planned(
    recipes: "Sequence[AnyRecipe]",
    folders: Sequence[Path],
    training: Sequence[str],
    validation: Sequence[str],
    fold: "Fold | None",
    options: dict[str, Any],
) -> "tuple[list[Records], list[RunPlan]]":
    """Return the records and a plan of each run; ``options`` are those of both."""
    from ensemble_kit.data.dataset import Records
    from ensemble_kit.training.plan import RunPlan

    planned = {field.name for field in fields(RunPlan)} & options.keys()
    reading = {name: value for name, value in options.items() if name not in planned}
    records = [Records(patterns, **reading) for patterns in (training, validation) if patterns]
    parts = records if fold is None else records[0].folds(fold)
    plans = [
        RunPlan(
            recipe=recipe,
            training=parts[0],
            validation=parts[1] if len(parts) > 1 else None,
            folder=folder,
            **{name: options[name] for name in planned},
        )
        for recipe, folder in zip(recipes, folders, strict=True)
    ]
    return records, plans


def _jobs(plans: "Sequence[RunPlan]", recipes: Sequence[str]) -> "list[Job]":
    """Return a job for each run, which trains it as this command was asked to."""
    from ensemble_kit.engines.jobs import Job

    left_out = {*Engine._fields, "ensemble", "index", "overrides"}
    words = words_of(click.get_current_context(), leave_out=left_out)
    return [
        Job(plan.run.name, ("train", *words, *_set_words(plan.recipe), "--", recipe))
        for plan, recipe in zip(plans, recipes, strict=True)
    ]


def _train_one(plan: "RunPlan", dtypes: Sequence[Dtype], *, force: bool, as_json: bool) -> None:
    from ensemble_kit.pipeline import train as train_plan

    finished = train_plan(plan, predict_dtypes=dtypes, force=force)
    if finished.trained.is_stopped:
        click.echo(_describe_stop(plan.run.path, finished.trained.steps), err=True)
        raise click.exceptions.Exit(INTERRUPTED)
    if finished.averaged is None:  # another of torchrun's processes says it
        return
    if as_json:
        echo_json(_facts(finished))
    else:
        click.echo(_describe(finished, plan.recipe.training.max_steps))


def _set_words(recipe: "AnyRecipe") -> list[str]:
    return [f"--set={override}" for override in recipe.metadata.overrides]


def _named(recipes: Sequence[str], ensemble: str | None) -> tuple[str, ...]:
    """Return the recipes that are given by name, then those of an ensemble that are not yet."""
    from ensemble_kit.recipes.ensembles import load_ensemble

    members = load_ensemble(ensemble).named_members() if ensemble is not None else []
    if not recipes and not members:
        raise click.UsageError("Give a RECIPE, or --ensemble NAME.")
    return tuple(dict.fromkeys([*recipes, *members]))


def _require_index(index: int, recipes: Sequence[str]) -> None:
    if index > len(recipes):
        raise click.UsageError(
            f"--index is {index}, but the command names {counted(len(recipes), 'recipe')}."
        )


def _describe(finished: "FinishedRun", max_steps: int) -> str:
    run = finished.trained
    done = "was already finished: " if run.was_finished else ""
    early = f"{run.steps:,} of " if run.steps < max_steps else ""  # its patience ran out
    steps = counted(max_steps if early else run.steps, "step")
    line = f"{run.folder.path}: {done}{early}{steps} in {run.seconds:.1f} s"
    if finished.averaged_gap is not None:
        line += f", validation GAP@20 {finished.averaged_gap:.4f} ({finished.averaged}"
        line += f"; best single checkpoint {run.best_gap:.4f})"
    return line


def _facts(finished: "FinishedRun") -> dict[str, Any]:
    run = finished.trained
    return {
        "run": run.folder.path,
        "was_finished": run.was_finished,
        "steps": run.steps,
        "seconds": run.seconds,
        "gap": finished.averaged_gap,
        "averaged": finished.averaged,
        "best_checkpoint_gap": run.best_gap,
    }


def _describe_stop(folder: Path, steps: int) -> str:
    if not steps:
        return f"{folder}: stopped before its first step."
    return (
        f"{folder}: stopped at step {steps}; the same command resumes it.\n"
        f"Use its checkpoints so far with `ensemble-kit average {folder}`."
    )
