"""What a busy machine costs `train` and `demo`, with OpenMP's threads asleep or spinning.

    python benchmarks/busy_machine.py [train demo] [--spinners 4] [--steps 40] [--rounds 1] [--json]

The same command runs alone and beside processes that compute without end, each time with
OMP_WAIT_POLICY=passive, which the kit sets where the user does not, and with active, which is what
OpenMP does by itself. `train` is demo/netvlad on the records of `data synthesize`, `demo` the whole
demo; --steps is how many steps each of their recipes takes, and 320 is what they say themselves. A
command that takes more than --limit seconds is ended, and counts as that long.
"""

import itertools
import os
import subprocess
import sys
import tempfile
import time
from functools import partial

from common import Figures, in_turn, machine, parser_of, print_json, print_table, ratio, spread

SPIN = """
import os
parent = os.getppid()
while os.getppid() == parent:  # it ends with the script, however that ends
    for _ in range(10**6):
        pass
"""
POLICIES = ("passive", "active")
RECORDS = "--train data/train/*.tfrecord --validation data/validate/*.tfrecord"
COMMANDS = {"train": f"train demo/netvlad {RECORDS} --name {{}} --quiet", "demo": "demo {} --quiet"}


def main() -> None:
    """Run each command alone and beside others, with each policy, and print a table."""
    parser = parser_of(__doc__)
    parser.add_argument("commands", nargs="*", choices=COMMANDS, default=["train"])
    parser.add_argument("--spinners", type=int, default=4, help="processes that compute beside it")
    parser.add_argument("--steps", type=int, default=40, help="steps of each recipe")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=600, help="seconds after which it is ended")
    options = parser.parse_args()
    steps = 8 if options.quick else options.steps
    beside = (0, options.spinners)
    said = machine()
    with tempfile.TemporaryDirectory() as folder:
        run(["data", "synthesize", "data"], folder, {}, options.limit)
        cases = list(itertools.product(options.commands, beside, POLICIES))
        found = in_turn(
            {
                f"{command} beside {spinners}, {policy}": partial(
                    measure, folder, command, spinners, policy, steps, options.limit
                )
                for command, spinners, policy in cases
            },
            rounds=options.rounds,
        )
    ratios = {
        f"{command} beside {spinners}": ratio(
            *(found[f"{command} beside {spinners}, {each}"]["seconds"] for each in POLICIES[::-1])
        )
        for command, spinners in itertools.product(options.commands, beside)
    }
    if options.as_json:
        print_json(ratios=ratios, machine=said, steps=steps, found=found)
        return
    print(f"{said}; {steps} steps of each recipe.")
    print_table(
        ["command", "others", "passive, s", "active, s", "active / passive"],
        [
            [
                command,
                str(spinners),
                *(
                    spread(found[f"{command} beside {spinners}, {each}"]["seconds"], digits=1)
                    for each in POLICIES
                ),
                f"{ratios[f'{command} beside {spinners}']:.1f}",
            ]
            for command, spinners in itertools.product(options.commands, beside)
        ],
    )


def measure(
    folder: str, command: str, spinners: int, policy: str, steps: int, limit: float
) -> Figures:
    """Run a command beside others; return its seconds, imports included."""
    words = COMMANDS[command].format(f"{command}-{time.monotonic_ns()}").split()
    overrides = f"training.max_steps={steps} training.checkpoint_every={max(1, steps // 8)}"
    environment = {"OMP_WAIT_POLICY": policy, "ENSEMBLE_KIT_TRAIN_OVERRIDES": overrides}
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(spinners)]
    try:
        return run(words, folder, environment, limit)
    finally:
        for other in others:
            other.kill()
            other.wait()


def run(words: list[str], folder: str, environment: dict[str, str], limit: float) -> Figures:
    """Run a command of the kit; return its seconds."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "ensemble_kit", *words],
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        if process.wait(limit):
            sys.exit(f"{' '.join(words)} ended with exit code {process.returncode}")
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    seconds = time.perf_counter() - begun
    print(f"{seconds:.1f} s", file=sys.stderr)
    return {"seconds": seconds}


if __name__ == "__main__":
    main()
