"""``python -m ensemble_kit`` is ``ensemble-kit``."""

from ensemble_kit.cli import main

main(prog_name="ensemble-kit")
