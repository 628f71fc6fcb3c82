"""``python -m ensemble_kit`` and ``ensemble-kit``: the command line."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from ensemble_kit.interrupts import signals_end


def run() -> None:
    """Run the command that ``sys.argv`` holds, and end the process with its exit code."""
    # For every Python that libraries start, such as torch.compile: none may import a file of the
    # current folder in place of a module.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    _open_what_is_closed()
    signals_end()
    try:
        from ensemble_kit.cli import main  # here, so that Ctrl-C while it loads is handled too

        main(prog_name="ensemble-kit")
    except ModuleNotFoundError as error:
        _tell_what_is_missing(error)


def _tell_what_is_missing(error: ModuleNotFoundError) -> NoReturn:
    """End with one line where a library is missing, as on a server that only runs models."""
    if error.name is None or error.name.partition(".")[0] == "ensemble_kit":
        raise error
    print(
        f"Error: This command needs the library {error.name.partition('.')[0]}, which is not "
        "installed.\nInstall the kit with all that it needs: pip install ensemble-kit",
        file=sys.stderr,
    )
    sys.exit(1)


def _open_what_is_closed() -> None:
    """Give a process that was started with standard streams closed some that lead nowhere.

    Otherwise the first files that it opens would be in their place, and be written into by
    whatever a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115 - for good


def _forget_current_folder() -> None:
    """Take the current folder, which ``python -m`` puts first, out of the path of imports.

    Otherwise a file of the user's that is named like a module, ``pickle.py``, would be run in its
    place. Where the kit itself is imported from there, as in a checkout, it has to stay.
    """
    here = Path.cwd().resolve()
    is_first = bool(sys.path) and Path(sys.path[0]).resolve() == here
    if is_first and not sys.flags.safe_path and Path(__file__).resolve().parents[1] != here:
        del sys.path[0]


if __name__ == "__main__":
    _forget_current_folder()
    run()
