"""Jobs side by side for a command: its options, what starts them, how their ends are printed."""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import click

from ensemble_kit.choices import CPUS_EACH, GPUS_EACH
from ensemble_kit.interrupts import INTERRUPTED, require_process_groups

if TYPE_CHECKING:
    from ensemble_kit.engines.jobs import Job, JobEnd

F = TypeVar("F", bound=Callable[..., Any])


class Engine(NamedTuple):
    """What runs a command's jobs, if the user asked for jobs.

    Attributes:
        jobs: How many may run at a time; None lets a cluster decide.
        on: A Ray cluster's address; None runs processes of this machine.
        cpus_each: CPUs of a job on a cluster.
        gpus_each: GPUs of a job on a cluster.
    """

    jobs: int | None
    on: str | None
    cpus_each: int
    gpus_each: float

    @property
    def is_wanted(self) -> bool:
        """Whether the command's work is to be run as jobs."""
        return self.jobs is not None or self.on is not None


def engine_options(command: F) -> F:
    """Add the options that run a command's work as several jobs; it gets them as ``engine``."""

    @wraps(command)
    def with_engine(*arguments: Any, **options: Any) -> Any:
        engine = Engine(**{name: options.pop(name) for name in Engine._fields})
        _refuse_unasked_gpus(engine, options["device"])
        return command(*arguments, engine=engine, **options)

    wrapped = cast(F, with_engine)
    for option in (
        click.option(
            "--gpus-each", type=click.FloatRange(min=0), default=GPUS_EACH, show_default=True,
            metavar="N", help="GPUs that a job of a cluster asks for.",
        ),
        click.option(
            "--cpus-each", type=click.IntRange(min=1), default=CPUS_EACH, show_default=True,
            metavar="N", help="CPUs that a job of a cluster asks for, and its threads.",
        ),
        click.option(
            "--on", metavar="ADDRESS",
            help="Run jobs on this Ray cluster: ray://HOST:10001, or auto on one of its machines.",
        ),
        click.option(
            "--jobs", type=click.IntRange(min=1), metavar="N",
            help="Run N jobs at a time, each in its own process.",
        ),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def _refuse_unasked_gpus(engine: Engine, device: str) -> None:
    """Raise a usage error if jobs of a cluster would use GPUs that they do not ask it for."""
    if engine.on is not None and device == "cuda" and not engine.gpus_each:
        raise click.UsageError(
            "With --on, --device cuda needs --gpus-each: the cluster would start jobs on machines "
            "without a GPU, and all of a machine's jobs on one. Give --gpus-each 1."
        )


def run_side_by_side(
    jobs: Sequence["Job"],
    engine: Engine,
    *,
    folders: Sequence[Path],
    on_printed: Callable[[str], None] | None = None,
) -> None:
    """Run jobs, print how each one ends, and leave with a code that says how all of them did.

    Args:
        jobs: The jobs.
        engine: What runs them.
        folders: The folders that they write.
        on_printed: Called with what each job has printed; None prints it.

    Raises:
        JobError: A job has failed, or the cluster cannot run it.
    """
    from ensemble_kit.engines.jobs import require_finished, run_jobs
    from ensemble_kit.engines.processes import start_process, threads_each

    run = partial(run_jobs, jobs, on_end=partial(_echo_end, on_printed or _echo_printed))
    at_once = max(1, min(engine.jobs or len(jobs), len(jobs)))
    if engine.on is None:
        require_process_groups("--jobs")
        ends = run(partial(start_process, threads=threads_each(at_once)), at_once=at_once)
    else:
        from ensemble_kit.engines.ray import ray_cluster

        cpus, gpus = engine.cpus_each, engine.gpus_each
        with ray_cluster(engine.on, folders=folders, cpus_each=cpus, gpus_each=gpus) as start:
            ends = run(start, at_once=at_once)
    stopped = [end.job.name for end in ends if end.state == "stopped"]
    for end in ends:
        if end.node:
            click.echo(f"{end.job.name}: {end.state} on {end.node}", err=True)
    if stopped:
        click.echo(f"Stopped; the same command resumes: {', '.join(stopped)}.", err=True)
    require_finished(ends)
    if stopped:
        raise click.exceptions.Exit(INTERRUPTED)


def _echo_printed(text: str) -> None:
    click.echo(text, nl=False)


def _echo_end(on_printed: Callable[[str], None], end: "JobEnd") -> None:
    on_printed(end.printed)
    if end.state == "failed":
        click.echo(f"{end.job.name}: failed: {end.problem}", err=True)
