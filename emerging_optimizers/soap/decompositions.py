"""Matrix decompositions that never stop a run.

Each takes a stack (B, d, d) and what to keep where nothing helps. A matrix whose decomposition raises, or returns
something that is not finite, is retried alone in float64, then on the CPU, and then what was there stays. Every call
of a routine that can fail on a matrix stands in this module, or in ``gram_schmidt``, whose failures end up here;
``tests/reliability/test_faults.py`` plants failures in each of them, and fails if there is one that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from emerging_optimizers.precision import add_matrix_product_, fp32_matmul_precision, matrix_product
from emerging_optimizers.soap import state
from emerging_optimizers.soap.gram_schmidt import hardly_turned, orthonormalise_
from emerging_optimizers.soap.incidents import report
from emerging_optimizers.soap.kronecker import column_products

Result = TypeVar("Result")

#: On a CPU, matrices of at least so many rows are orthonormalised by panels of so many columns, in 0.6 to 0.9 of the
#: time that LAPACK's QR takes (``benchmarks/panels.py``). Smaller ones are as fast without.
PANELS = {256: 64, 384: 96, 1024: 128}

#: A panel of at least so many rows is itself worked on by panels of so many columns: on Intel CPUs LAPACK takes 2 to 7
#: times as long for one of more than 512 rows on two threads as on one (``benchmarks/panels.py``).
TALL, NARROW = 1024, 32

#: On a CPU, matrices of at least so many rows are orthonormalised by Gram-Schmidt where that is good enough. Smaller
#: ones gain in large stacks where no column needs another pass; in a training they take longer.
GRAM_SCHMIDT_FROM = 256

#: Rows of a matrix are so many numbers longer in memory while Gram-Schmidt works on it, in 0.94 to 0.98 of the time:
#: parts of rows that are a power of two long share few places in a cache.
PADDING = 16


def eigenvectors(matrices: Tensor, last_good: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of symmetric matrices, in descending order of eigenvalue.

    Args:
        matrices: (B, d, d), symmetric; the lower triangle is read.
        last_good: (B, d, d), kept where no decomposition succeeds.

    Returns:
        The eigenvectors (B, d, d) as columns, and whether ``last_good`` was kept, (B,).
    """
    return _rescued("eigh", _eigh, lambda: matrices, lambda: last_good)


def orthonormal_columns(
    matrices: Tensor, last_good: Tensor, order: Tensor | None = None, quotients: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``Q`` of the QR decomposition, up to the signs of its columns.

    Args:
        matrices: (B, d, d).
        last_good: (B, d, d), kept where no decomposition succeeds.
        order: (B, d), in which the columns of both are taken; None: as they stand.
        quotients: Inner products of each column of ``matrices`` and the same of ``last_good``, (B, d). With them, large
            matrices on a CPU whose columns have hardly turned are orthonormalised by Gram-Schmidt, which is faster.

    Returns:
        ``Q``, (B, d, d), and whether ``last_good`` was kept, (B,).
    """
    small = matrices.shape[-1] < GRAM_SCHMIDT_FROM
    if quotients is None or small or state.masks_on(matrices.device):  # Gram-Schmidt decides on the host
        return _by_householder(matrices, last_good, order)
    attempt = _attempt(lambda: _gram_schmidt(matrices, order, quotients))
    if attempt is None or not bool(attempt[1].any()):
        return _by_householder(matrices, last_good, order)
    result, done = attempt
    rest = (~done).nonzero().squeeze(-1)
    failed = torch.zeros_like(done)
    if len(rest):
        part = None if order is None else order[rest]
        result[rest], failed[rest] = _by_householder(matrices[rest], last_good[rest], part)
    return result, failed


def _by_householder(matrices: Tensor, last_good: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    return _rescued("qr", _householder, lambda: _in_order(matrices, order), lambda: _in_order(last_good, order))


def _in_order(stack: Tensor, order: Tensor | None, padding: int = 0) -> Tensor:
    """A copy with the columns in this order, whose rows are so many numbers longer in memory."""
    count, rows, columns = stack.shape
    copy = stack.new_empty(count, rows, columns + padding)[..., :columns]
    if order is None:
        return copy.copy_(stack)
    return torch.gather(stack, -1, order.unsqueeze(-2).expand_as(stack), out=copy)


def _gram_schmidt(matrices: Tensor, order: Tensor | None, quotients: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns of those of ``matrices`` that Gram-Schmidt is good for, and which these are, (B,)."""
    norms = column_products(matrices, matrices).sqrt()
    done = hardly_turned(quotients, norms)
    which = done.nonzero().squeeze(-1)
    if len(which) == 0:
        return matrices, done
    every = len(which) == len(matrices)
    if not every:
        matrices, norms, order = matrices[which], norms[which], None if order is None else order[which]
    stack = _in_order(matrices, order, PADDING)
    stack.div_((norms if order is None else norms.gather(-1, order)).unsqueeze(-2))
    with fp32_matmul_precision("highest", stack):
        orthonormal = orthonormalise_(stack)
    if every:
        return stack, orthonormal
    result = stack.new_empty(len(done), *stack.shape[1:])
    result[which] = stack
    done[which] = orthonormal
    return result, done


def _eigh(matrices: Tensor) -> Tensor:
    vectors: Tensor = torch.linalg.eigh(matrices).eigenvectors
    return vectors.flip(-1)


def _householder(matrices: Tensor) -> Tensor:
    if matrices.device.type == "cpu" and matrices.shape[-1] >= min(PANELS):
        with fp32_matmul_precision("highest", matrices):
            return _householder_by_panels(matrices)
    # torch.linalg.qr would also spend time on R.
    orthonormal: Tensor = torch.linalg.householder_product(*torch.geqrf(matrices))
    return orthonormal


def _householder_by_panels(rest: Tensor) -> Tensor:
    """``Q`` of Householder's QR with all work but a panel's own in matrix products; ``rest`` is overwritten.

    LAPACK works the same way, in narrower panels.
    """
    size = rest.shape[-1]
    width = max((panel for rows, panel in PANELS.items() if rows <= size), default=min(PANELS.values()))
    panels = [(start, v, minus_vt) for start, v, minus_vt, _ in _reflect_by_panels(rest, width)]
    result = rest.zero_()  # R is not wanted, and on a CPU new memory costs as much as a product
    result.diagonal(dim1=-2, dim2=-1).fill_(1)
    for start, v, minus_vt in reversed(panels):
        corner = result[:, start:, start:]  # what is left of it and above is still the identity's
        width = v.shape[-1]  # and of itself these rows and columns
        along = matrix_product(v[:, width:].mT, corner[:, width:, width:])
        add_matrix_product_(corner, minus_vt, torch.cat([v[:, :width].mT, along], -1))
    return result


def _reflect_by_panels(rest: Tensor, width: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Householder's reflections of ``rest`` (B, r, c), panel by panel of so many columns. ``rest`` is overwritten.

    The reflections of a panel are one product ``H_1 .. H_p = I - V T V^T`` (compact WY form, Schreiber and Van Loan,
    1989) with ``T = (I + diag(tau) triu(V^T V, 1))^-1 diag(tau)``, which also holds for a reflection that does nothing,
    ``tau = 0``.

    Yields:
        The number of the panel's first column and row, ``V``, ``-V T`` and ``tau``.
    """
    columns = rest.shape[-1]
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        v, tau = _reflections(rest[:, start:, start:stop])
        system = matrix_product(v.mT, v).triu_(1).mul_(tau.unsqueeze(-1))  # solved as if its diagonal were 1
        minus_t = torch.linalg.solve_triangular(system, torch.diag_embed(-tau), upper=True, unitriangular=True)
        minus_vt = matrix_product(minus_t.mT, v.mT).mT  # by columns, as geqrf returns v: products of such are faster
        if stop < columns:
            # Of the rows that the panel reaches its own would be R's, which is not wanted.
            along = matrix_product(minus_vt.mT, rest[:, start:, stop:])
            add_matrix_product_(rest[:, stop:, stop:], v[:, stop - start :], along)
        yield start, v, minus_vt, tau


def _reflections(panel: Tensor) -> tuple[Tensor, Tensor]:
    """``V``, of unit lower trapezoidal shape, and ``tau`` of the reflections of a panel, which may be overwritten."""
    if panel.shape[-2] >= TALL and panel.shape[-1] > NARROW:
        by_columns = panel.contiguous().mT.contiguous().mT  # in two steps: each goes along memory
        v, taus = torch.zeros_like(by_columns), []
        for start, part, _, tau in _reflect_by_panels(by_columns, NARROW):
            v[:, start:, start : start + part.shape[-1]] = part
            taus.append(tau)
        return v, torch.cat(taus, -1)
    packed, tau = torch.geqrf(panel.contiguous())
    v = packed.tril_(-1)
    v.diagonal(dim1=-2, dim2=-1).fill_(1)
    return v, tau


def _rescued(
    name: str,
    decompose: Callable[[Tensor], Tensor],
    matrices: Callable[[], Tensor],
    last_good: Callable[[], Tensor],
) -> tuple[Tensor, Tensor]:
    """``decompose(matrices())`` with the rescue that this module promises, and whether the last good was kept, (B,).

    ``decompose`` may overwrite what it gets. Both stacks are made when they are needed, which for the last good is
    never on a CPU where nothing fails.
    """
    result = _attempt(lambda: decompose(matrices()))
    if result is not None:
        usable = result.sum((-2, -1)).isfinite()  # one pass; a NaN or Inf anywhere stays one
        if state.masks_on(result.device):
            return torch.where(usable.view(-1, 1, 1), result, last_good()), ~usable
        if bool(usable.all()):
            return result, ~usable
    outcomes = [_rescued_one(name, decompose, m, good) for m, good in zip(matrices(), last_good(), strict=True)]
    kept = torch.tensor([failed for _, failed in outcomes], device=outcomes[0][0].device)
    return torch.stack([one for one, _ in outcomes]), kept


def _rescued_one(
    name: str, decompose: Callable[[Tensor], Tensor], matrix: Tensor, last_good: Tensor
) -> tuple[Tensor, bool]:
    """The decomposition of one matrix (d, d), and whether the last good one was kept."""
    attempts: dict[str, Callable[[], Tensor]] = {
        "": lambda: matrix.clone(),
        "float64": lambda: matrix.to(torch.float64, copy=True),
        "cpu": lambda: matrix.to("cpu", torch.float64, copy=True),
    }
    outcomes = {"float64": "succeeded in float64", "cpu": "succeeded in float64 on the CPU"}
    for help_from, copy in attempts.items():
        # As a stack of one: what decomposes may be made for stacks.
        result = _attempt(lambda copy=copy: decompose(copy().unsqueeze(0)).squeeze(0))  # type: ignore[misc]
        if result is not None and bool(result.isfinite().all()):
            if help_from:
                _report(name, help_from, matrix, outcomes[help_from])
            return result.to(matrix), False
    _report(name, "kept", matrix, "failed in float64 and on the CPU too; the last good basis stays")
    return last_good, True


def _attempt(decompose: Callable[[], Result]) -> Result | None:
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
