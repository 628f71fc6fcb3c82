"""Jobs side by side for a command: its options, what starts them, how their ends are printed."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ensemble_kit.choices import CPUS_EACH, GPUS_EACH
from ensemble_kit.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from ensemble_kit.engines.jobs import Job, JobEnd

F = TypeVar("F", bound=Callable[..., Any])
NAMES = ("jobs", "on", "cpus_each", "gpus_each")  # of the options, which jobs are not given


def engine_options(command: F) -> F:
    """Add the options that run a command's work as several jobs."""
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
        command = option(command)
    return command


def run_side_by_side(
    jobs: Sequence["Job"],
    *,
    folders: Sequence[Path],
    at_once: int | None,
    on: str | None,
    cpus_each: int,
    gpus_each: float,
    on_printed: Callable[[str], None] | None = None,
) -> None:
    """Run jobs, print how each one ends, and leave with a code that says how all of them did.

    Args:
        jobs: The jobs.
        folders: The folders that they write.
        at_once: How many may run at a time; None lets a cluster decide.
        on: A Ray cluster's address; None runs processes of this machine.
        cpus_each: CPUs of a job on a cluster.
        gpus_each: GPUs of a job on a cluster.
        on_printed: Called with what each job has printed; None prints it.

    Raises:
        JobError: A job has failed, or the cluster cannot run it.
    """
    from ensemble_kit.engines.jobs import require_finished, run_jobs
    from ensemble_kit.engines.processes import start_process, threads_each

    run = partial(run_jobs, jobs, on_end=partial(_echo_end, on_printed or _echo_printed))
    if on is None:
        at_once = at_once or 1
        ends = run(partial(start_process, threads=threads_each(at_once)), at_once=at_once)
    else:
        from ensemble_kit.engines.ray import ray_cluster

        with ray_cluster(on, folders=folders, cpus_each=cpus_each, gpus_each=gpus_each) as start:
            ends = run(start, at_once=at_once or len(jobs))
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
