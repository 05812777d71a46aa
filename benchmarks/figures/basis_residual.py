"""Whether a refresh at frequency 1 does what a peer's does: the residual of every eigenbasis, SOAP's and theirs.

    PYTHONPATH=. benchmarks/.venv-peers/bin/python -m benchmarks.figures.basis_residual     # half a minute

Both get the same 40 gradients of two GPT layers of width 128, a new one in every step. The residual of a basis is the
norm of what is off the diagonal of ``Q^T K Q``, over that of ``K``. ``benchmarks.speed.step_time`` makes the
environment.
"""

from statistics import mean

from torch import Tensor

from benchmarks.common import Trial, gpt, heading, parser, write

STEPS = 40


def residual(factor: Tensor, basis: Tensor) -> float:
    rotated = basis.T @ factor @ basis
    return ((rotated - rotated.diagonal().diag()).norm() / factor.norm()).item()


def residuals(name: str) -> list[float]:
    trial = Trial(name, gpt(128, 2), 1, gradients=STEPS)
    trial.play(STEPS)
    found = []
    for _, state in sorted(trial.optimizer.state_dict()["state"].items()):
        ours = [(state[f"GG_{axis}"], state[f"Q_{axis}"]) for axis in range(2)] if "GG_0" in state else None
        found += [residual(factor, basis) for factor, basis in ours or zip(state["GG"], state["Q"], strict=True)]
    return found


def main() -> None:
    given = parser(__doc__, "basis_residual.json").parse_args()
    found = {name: residuals(name) for name in ("soap", "pytorch-optimizer")}
    ratios = [own / theirs for own, theirs in zip(*found.values(), strict=True)]
    print({name: round(mean(values), 4) for name, values in found.items()})
    print(f"SOAP's over theirs, basis by basis: {min(ratios):.3f} to {max(ratios):.3f}")
    write(given.out, {**heading(), "steps": STEPS, "residuals": found})


if __name__ == "__main__":
    main()
