"""Steps of two checkouts of this repository in turns, which shows smaller differences than two runs can.

    python -m benchmarks.in_turns gpt-d512x2 10 ../before . --rounds 7 --optimizer soap-staggered

Each checkout has a process of its own; they take turns, a round of some whole refresh periods each, and only one works
at a time. Leave the machine alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median


def start(checkout: Path, name: str, frequency: int, optimizer: str) -> subprocess.Popen[str]:
    steps = frequency * max(1, 10 // frequency) if frequency > 1 else 4  # as in step_time
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.step_time", "--worker", optimizer, "--device", "cpu"]
    command += ["--sets", name, "--frequencies", str(frequency), "--steps", str(steps)]
    pipe, environment = subprocess.PIPE, {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(checkout.resolve())}
    worker = subprocess.Popen(command, cwd=checkout, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert worker.stdout is not None
    worker.stdout.readline()  # it is ready
    return worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set")
    parser.add_argument("frequency", type=int)
    parser.add_argument("checkouts", type=Path, nargs=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--optimizer", default="soap")
    given = parser.parse_args()
    workers = [start(checkout, given.set, given.frequency, given.optimizer) for checkout in given.checkouts]
    rounds: list[list[list[float]]] = [[], []]
    for number in range(given.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            stdin, stdout = workers[which].stdin, workers[which].stdout
            assert stdin is not None
            assert stdout is not None
            print(file=stdin, flush=True)
            rounds[which].append(json.loads(stdout.readline()))
    for worker in workers:
        worker.communicate()
    for checkout, taken in zip(given.checkouts, rounds, strict=True):
        places = [median(place) for place in zip(*taken, strict=True)]
        print(f"{checkout}: {median(map(mean, taken)):.1f} ms; by place", *(f"{place:.1f}" for place in places))
    ratios = [mean(new) / mean(old) for old, new in zip(*rounds, strict=True)]
    print(f"{median(ratios):.3f} of the time:", *(f"{ratio:.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
