"""What the pictures of ``docs/concept.md`` show, measured with the library's SOAP and torch's AdamW.

    python -m benchmarks.figures.concept             # two minutes of one core; nothing is timed
    python -m benchmarks.figures.concept valley      # only that part, the others stay
    python -m benchmarks.figures.concept_plot        # the pictures, from the result file

Three parts:

``valley``: the weight of ``nn.Linear(2, 1)`` is fitted by noisy least squares, in minibatches. The inputs have
variances 1 and 1/100 along two directions: the coordinate axes ("straight") or those turned by 45 degrees ("turned"),
start and target likewise. Every optimizer takes every rate of one grid, on the same batches; the rate falls to zero
linearly. Kept are the expected losses at the end, which need no sample, the path of the median seed at the best rate,
and how far the paths in the two valleys are apart, turned back, at the same rate and seed. ``eps`` is 1e-6 for both
optimizers: the first gradient of this weight has rank one, and at the default of 1e-8 the rounding across it, which
depends on the angle, becomes a whole step of SOAP. How far apart that puts the paths is kept too.

``basis``: the hidden layer's weight of the race's `digits`, (64, 512), and its Kronecker factor of axis 0. ``residual``
is that of ``health.examine`` after every step; the factor is kept as it is and in its basis, right after a refresh; and
the mean squares of the next period's gradients, in which that basis stands, are kept as they are and in the bases.

``frequency``: the race `digits` at refresh frequencies 1, 10 and 100 and the learning rate tuned at 10, beside AdamW at
its own.
"""

import json
import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import heading, parser, race, write
from emerging_optimizers.health import examine
from emerging_optimizers.lab.race.optimizers import BETAS, tuned_rate
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.soap import precondition

FREQUENCY = 10

ANGLES = {"straight": 0.0, "turned": math.pi / 4}
RATES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0)
VARIANCES = (1.0, 0.01)
START = (0.9, 3.0)  # the target is 0
VALLEY_STEPS, VALLEY_BATCH, NOISE = 50, 16, 0.3
VALLEY_SEEDS = range(21)
EPS, DEFAULT_EPS = 1e-6, 1e-8

WEIGHT, AXIS = "5.weight", 0
BASIS_STEPS = 300
SHOWN_AFTER = 201  # the step that refreshes is the first of a period

FREQUENCIES = (1, 10, 100)
SEEDS = (0, 1, 2, 3, 4)


def turn(angle: float) -> Tensor:
    """The rotation by an angle, (2, 2)."""
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def descend(name: str, rate: float, angle: float, seed: int, eps: float = EPS) -> tuple[float, list[list[float]]]:
    """The expected loss at the end, without the noise's share, and the weights after every step."""
    rotation = turn(angle)
    mixing = torch.tensor(VARIANCES).sqrt() * rotation  # columns are the directions
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_((rotation @ torch.tensor(START)).unsqueeze(0))
    options: dict[str, Any] = {"lr": rate, "betas": BETAS, "eps": eps, "weight_decay": 0.0}
    optimizer: torch.optim.Optimizer
    if name == "soap":
        optimizer = SOAP(layer.parameters(), **options, precondition_frequency=FREQUENCY)
    else:
        optimizer = torch.optim.AdamW(layer.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=VALLEY_STEPS)
    generator = torch.Generator().manual_seed(seed)
    path = [layer.weight[0].tolist()]
    for _ in range(VALLEY_STEPS):
        inputs = torch.randn(VALLEY_BATCH, 2, generator=generator) @ mixing.T
        targets = NOISE * torch.randn(VALLEY_BATCH, 1, generator=generator)
        optimizer.zero_grad()
        (0.5 * (layer(inputs) - targets).square().mean()).backward()
        optimizer.step()
        schedule.step()
        path.append(layer.weight[0].tolist())
    loss = 0.5 * (layer.weight.detach() @ mixing).square().sum().item()
    return loss, [[round(x, 4) for x in point] for point in path]


def valley() -> dict[str, Any]:
    found: dict[str, Any] = {
        "variances": VARIANCES,
        "start": START,
        "start_loss": 0.5 * sum(v * x * x for v, x in zip(VARIANCES, START, strict=True)),
        "steps": VALLEY_STEPS,
        "seeds": len(VALLEY_SEEDS),
        "frequency": FREQUENCY,
        "eps": EPS,
    }
    for where, angle in ANGLES.items():
        for name in ("adamw", "soap"):
            ends = {rate: [descend(name, rate, angle, seed)[0] for seed in VALLEY_SEEDS] for rate in RATES}
            medians = {rate: median(losses) for rate, losses in ends.items()}
            best = min(medians, key=medians.__getitem__)
            found[f"{name}, {where}"] = {
                "best_rate": best,
                "loss": medians[best],
                "sweep": {f"{rate:g}": float(f"{loss:.4g}") for rate, loss in medians.items()},
                "path": descend(name, best, angle, ends[best].index(medians[best]))[1],
            }
            print("valley", where, name, best, f"{medians[best]:.3g}", flush=True)
    rate = found["soap, straight"]["best_rate"]
    for name, eps in (("adamw", EPS), ("soap", EPS), ("soap", DEFAULT_EPS)):
        straight, turned = (torch.tensor(descend(name, rate, angle, 0, eps)[1]) for angle in ANGLES.values())
        apart = (turned @ turn(ANGLES["turned"]) - straight).norm(dim=1).max().item()
        found[f"{name}, paths apart, eps {eps:g}"] = round(apart, 4)
        print("valley", name, eps, "paths apart at", rate, round(apart, 4), flush=True)
    return found


def decades(entries: Tensor) -> list[list[float]]:
    """The powers of ten of entries, relative to the largest."""
    relative = entries.abs() / entries.abs().max()
    return [[round(x, 2) for x in row] for row in relative.clamp_min(1e-9).log10().tolist()]


def off_diagonal(matrix: Tensor) -> float:
    """The Frobenius norm of the off-diagonal part over that of the whole."""
    rest = matrix - matrix.diagonal().diag()
    return round((rest.norm() / matrix.norm()).item(), 4)


def shares(squares: Tensor, count: int = 200) -> dict[str, Any]:
    """Which share of the sum the largest entries have: the curve, and how many have nine tenths of it."""
    running = squares.flatten().sort(descending=True).values.double().cumsum(0)
    running /= running[-1].clone()
    places = sorted({round(len(running) ** (k / count)) for k in range(count + 1)})
    return {
        "entries": len(running),
        "nine_tenths_in": int((running < 0.9).sum()) + 1,
        "curve": [[n, round(running[n - 1].item(), 4)] for n in places],
    }


def basis() -> dict[str, Any]:
    rate = tuned_rate("digits", "soap")
    digits = race("digits", {"soap": rate}, [0], FREQUENCY, BASIS_STEPS)
    (run,) = digits.runs
    (optimizer,) = run.contender.optimizers
    weight = dict(run.model.named_parameters())[WEIGHT]
    grads: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: grads.append(weight.grad.detach().clone()))  # type: ignore[union-attr]
    residuals: list[float] = []
    found: dict[str, Any] = {"task": "digits", "weight": WEIGHT, "shape": list(weight.shape), "axis": AXIS}
    bases: list[Tensor] = []
    for _ in digits.play():
        examined = examine(optimizer, names=run.model.named_parameters(), exact_spectra=False)
        (tensor,) = (tensor for tensor in examined.tensors if tensor.name == WEIGHT)
        residuals.append(round(tensor.factors[AXIS].residual, 4))
        if run.step == SHOWN_AFTER:
            state = optimizer.state[weight]
            factor, bases = state[f"GG_{AXIS}"], [state["Q_0"].clone(), state["Q_1"].clone()]
            rotated = bases[AXIS].T @ factor @ bases[AXIS]
            found |= {"shown_after_step": run.step, "factor": decades(factor), "in_basis": decades(rotated)}
            found |= {"off_diagonal": off_diagonal(factor), "off_diagonal_in_basis": off_diagonal(rotated)}
    # The next refresh comes first in step SHOWN_AFTER + FREQUENCY.
    period = grads[SHOWN_AFTER : SHOWN_AFTER + FREQUENCY - 1]
    found["squares"] = shares(torch.stack(period).square().mean(0))
    found["squares_in_basis"] = shares(torch.stack([precondition(grad, bases) for grad in period]).square().mean(0))
    late = residuals[100:]
    found["largest_after_step_100"] = max(late)
    found["median_after_refresh"] = median(late[0::FREQUENCY])
    found["median_before_refresh"] = median(late[FREQUENCY - 1 :: FREQUENCY])
    print("basis", {key: value for key, value in found.items() if isinstance(value, float)}, flush=True)
    return found | {"frequency": FREQUENCY, "rate": rate, "residual": residuals}


def frequency() -> dict[str, Any]:
    found: dict[str, Any] = {"task": "digits", "seeds": len(SEEDS)}
    for name, steps in [("adamw", FREQUENCY), *(("soap", f) for f in FREQUENCIES)]:
        rate = tuned_rate("digits", name)
        digits = race("digits", {name: rate}, SEEDS, steps)
        for _ in digits.play():
            pass
        records = [run.record for run in digits.runs]
        best = [min(record.validation) for record in records]
        key = name if name == "adamw" else f"soap, {steps}"
        found[key] = {
            "rate": rate,
            "diverged": sum(record.diverged is not None for record in records),
            "best": [round(value, 5) for value in best],
            "median_best": round(median(best), 5),
            "steps": records[0].eval_steps,
            "curve": [round(median(column), 5) for column in zip(*(r.validation for r in records), strict=True)],
        }
        print("frequency", key, found[key]["best"], flush=True)
    return found


def main() -> None:
    parts: dict[str, Callable[[], dict[str, Any]]] = {"valley": valley, "basis": basis, "frequency": frequency}
    arguments = parser(__doc__, "concept.json")
    arguments.add_argument("parts", nargs="*", default=[*parts], help=f"of {', '.join(parts)}")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    result |= heading()
    for name in given.parts:
        result[name] = parts[name]()
        write(given.out, result)


if __name__ == "__main__":
    main()
