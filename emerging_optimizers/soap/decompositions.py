"""Matrix decompositions that never stop a run.

Each takes a stack (B, d, d) and what to keep where nothing helps. A matrix whose decomposition raises, or returns
something that is not finite, is retried alone in float64, then on the CPU, and then what was there stays. Every call
of a routine that can fail on a matrix stands in this module;
``tests/reliability/test_faults.py`` plants failures in each of them, and fails if there is one that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from emerging_optimizers.soap import state
from emerging_optimizers.soap.incidents import report


def eigenvectors(matrices: Tensor, last_good: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of symmetric matrices, in descending order of eigenvalue.

    Args:
        matrices: (B, d, d), symmetric; the lower triangle is read.
        last_good: (B, d, d), kept where no decomposition succeeds.

    Returns:
        The eigenvectors (B, d, d) as columns, and whether ``last_good`` was kept, (B,).
    """
    return _rescued("eigh", _eigh, matrices, last_good)


def orthonormal_columns(matrices: Tensor, last_good: Tensor) -> tuple[Tensor, Tensor]:
    """``Q`` of Householder's QR decomposition.

    Args:
        matrices: (B, d, d).
        last_good: (B, d, d), kept where no decomposition succeeds.

    Returns:
        ``Q``, (B, d, d), and whether ``last_good`` was kept, (B,).
    """
    return _rescued("qr", _householder, matrices, last_good)


def _eigh(matrices: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(matrices).eigenvectors
    return vectors.flip(-1)


def _householder(matrices: Tensor) -> Tensor:
    # torch.linalg.qr would also spend time on R.
    orthonormal: Tensor = torch.linalg.householder_product(*torch.geqrf(matrices))
    return orthonormal


def _rescued(
    name: str, decompose: Callable[[Tensor], Tensor], matrices: Tensor, last_good: Tensor
) -> tuple[Tensor, Tensor]:
    """``decompose(matrices)`` with the rescue that this module promises, and whether the last good was kept, (B,)."""
    result = _attempt(lambda: decompose(matrices))
    if result is not None:
        usable = result.sum((-2, -1)).isfinite()  # one pass; a NaN or Inf anywhere stays one
        if state.masks_on(result.device):
            return torch.where(usable.view(-1, 1, 1), result, last_good), ~usable
        if bool(usable.all()):
            return result, ~usable
    outcomes = [_rescued_one(name, decompose, m, good) for m, good in zip(matrices, last_good, strict=True)]
    kept = torch.tensor([failed for _, failed in outcomes], device=outcomes[0][0].device)
    return torch.stack([one for one, _ in outcomes]), kept


def _rescued_one(
    name: str, decompose: Callable[[Tensor], Tensor], matrix: Tensor, last_good: Tensor
) -> tuple[Tensor, bool]:
    """The decomposition of one matrix (d, d), and whether the last good one was kept."""
    attempts: dict[str, Callable[[], Tensor]] = {
        "": lambda: matrix,
        "float64": lambda: matrix.to(torch.float64),
        "cpu": lambda: matrix.to("cpu", torch.float64),
    }
    outcomes = {"float64": "succeeded in float64", "cpu": "succeeded in float64 on the CPU"}
    for help_from, as_given in attempts.items():
        result = _attempt(lambda as_given=as_given: decompose(as_given()))  # type: ignore[misc]
        if result is not None and bool(result.isfinite().all()):
            if help_from:
                _report(name, help_from, matrix, outcomes[help_from])
            return result.to(matrix), False
    _report(name, "kept", matrix, "failed in float64 and on the CPU too; the last good basis stays")
    return last_good, True


def _attempt(decompose: Callable[[], Tensor]) -> Tensor | None:
    try:
        return decompose()
    except RuntimeError:  # torch.linalg.LinAlgError, no memory left, and the errors of the libraries beneath
        return None


def _report(name: str, help_from: str, matrix: Tensor, outcome: str) -> None:
    report(
        f"{name} {help_from}",
        "%s of a %d x %d Kronecker factor on %s failed and %s.",
        name,
        *matrix.shape,
        matrix.device,
        outcome,
    )
