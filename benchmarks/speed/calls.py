"""How many Python calls a step makes, and through which modules: SOAP on one 64 x 32 matrix, and torch's Muon.

    python -m benchmarks.speed.calls        # seconds; counts, so that the machine may be busy

Counted are calls of Python functions from ``optimizer.step()`` down, torch's hooks and decorators included, with
``sys.setprofile``; a generator counts each time that it is resumed. An optimizer's own code is what is in
``emerging_optimizers``, for Muon in ``torch.optim``.
"""

import sys
from collections import Counter
from types import FrameType
from typing import Any

from benchmarks.common import Trial, heading, parser, table, write

FREQUENCY = 10


def counted(trial: Trial, package: str) -> dict[str, Any]:
    """The calls of one step."""
    calls: Counter[str] = Counter()

    def see(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            calls[frame.f_globals.get("__name__", "")] += 1

    trial.set_gradients()
    step = trial.optimizer.step
    sys.setprofile(see)
    step()
    sys.setprofile(None)
    own = {module: count for module, count in sorted(calls.items()) if module.startswith(package)}
    return {"own_modules": len(own), "calls": calls.total(), "own_calls": sum(own.values()), "by_own_module": own}


def main() -> None:
    given = parser(__doc__, "calls.json").parse_args()
    soap, muon = (Trial(name, [(64, 32)], FREQUENCY) for name in ("soap", "muon"))
    soap.play(2 * FREQUENCY - 1)  # what is made once is made
    muon.play(2)
    plain, refreshing = (counted(soap, "emerging_optimizers") for _ in range(2))
    results = {"SOAP, plain step": plain, "SOAP, refreshing step": refreshing, "Muon": counted(muon, "torch.optim")}
    for name, line in results.items():
        print(f"{name}:", ", ".join(f"{module} {count}" for module, count in line["by_own_module"].items()))
    rows = [[name, *list(line.values())[:3]] for name, line in results.items()]
    print(table("step | own modules | Python calls | of them own", rows))
    write(given.out, {**heading(), "shape": [64, 32], "frequency": FREQUENCY, "results": results})


if __name__ == "__main__":
    main()
