"""What a step works on, stacks, and their linear algebra: products with bases, decompositions that never stop a run.

Conventions. A stack of B tensors is (B, d_1, .., d_N). Axis numbers count a tensor's own axes from 0. A Kronecker
factor ``K_k`` and an eigenbasis ``Q_k`` are (B, d_k, d_k); an axis without them has the identity for a basis. Columns
of ``Q_k`` are eigenvectors, the one with the largest eigenvalue first. Nothing here knows the optimizer. Where asking a
device would mean waiting for it, nothing is decided on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from emerging_optimizers.soap.incidents import report
from emerging_optimizers.soap.precision import fp32_matmul_precision

#: Diagonal shift before an eigendecomposition, relative to the largest diagonal entry.
EIGH_SHIFT = {torch.float32: 1e-7, torch.float64: 1e-15}


@dataclass
class Stack:
    """The state of B equal tensors, as a step works on it: in the working dtype, changed in place.

    Attributes:
        step: The steps that they have done.
        based: Whether any of them has an eigenbasis; without one ``Q`` is the identity.
        M, V: First and second moment, (B, d_1, .., d_N), in the bases.
        K, Q: Kronecker factor and eigenbasis of each preconditioned axis, (B, d_k, d_k).
        refresh_step: (B,), the value of ``step`` after the last refresh that was due; empty where no axis has a factor.
        failed: (B,), how many refreshes kept the last good basis; empty where no axis has a factor.
    """

    step: int
    based: bool
    M: Tensor
    V: Tensor
    K: dict[int, Tensor]
    Q: dict[int, Tensor]
    refresh_step: Tensor
    failed: Tensor

    def __getitem__(self, rows: slice) -> Stack:
        """Some of the tensors, as views."""
        K, Q = ({axis: matrices[rows] for axis, matrices in several.items()} for several in (self.K, self.Q))
        counters = (self.refresh_step[rows], self.failed[rows])
        return Stack(self.step, self.based, self.M[rows], self.V[rows], K, Q, *counters)

    @property
    def bases(self) -> dict[int, Tensor]:
        """The eigenbases that there are."""
        return self.Q if self.based else {}


def along(values: Tensor, like: Tensor, axis: int | None = None) -> Tensor:
    """(B,) or, along an axis, (B, d_axis), shaped so that it broadcasts against (B, d_1, .., d_N)."""
    shape = [len(values)] + [1] * (like.dim() - 1)
    if axis is not None:
        shape[1 + axis] = values.shape[1]
    return values.view(shape)


def where_stacked(chosen: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    """``new`` for the tensors of a stack that are chosen, (B,), else ``old``; all of ``new`` where nothing is."""
    return new if chosen is None else torch.where(along(chosen, new), new, old)


def unfold(stack: Tensor, axis: int) -> Tensor:
    """The matricisation of every tensor along ``axis``: (B, d_axis, product of the other axes)."""
    return stack.movedim(1 + axis, 1).reshape(len(stack), stack.shape[1 + axis], -1)


def project(stack: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """``Q_1^T T Q_2`` for a matrix: each axis is contracted with its basis in turn and goes to the end."""
    for axis in range(stack.dim() - 1):
        stack = stack.movedim(1, -1)
        if axis in bases:
            stack = (stack.reshape(stack.shape[0], -1, stack.shape[-1]) @ bases[axis]).view(stack.shape)
    return stack


def project_back(stack: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """The inverse of :func:`project` for orthonormal bases: ``Q_1 T Q_2^T`` for a matrix."""
    return project(stack, {axis: basis.mT for axis, basis in bases.items()})


def rayleigh_quotients(factors: Tensor, bases: Tensor) -> Tensor:
    """``diag(Q^T K Q)`` as (B, d), the eigenvalues of ``K`` where ``Q`` is its eigenbasis.

    Always in full float32: in TensorFloat-32 the small eigenvalues drown in the rounding of the large ones.
    """
    with fp32_matmul_precision("highest"):
        return (bases * (factors @ bases)).sum(-2)


def largest_diagonal(factors: Tensor) -> Tensor:
    """The largest diagonal entry of each matrix, (B, 1, 1), or 1 where it is 0: the scale to divide by."""
    largest = factors.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    return torch.where(largest > 0, largest, 1.0).view(-1, 1, 1)


def sorted_eigenvectors(factors: Tensor, last_good: Tensor, shift: float | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvectors of Kronecker factors by ``eigh``.

    A factor is divided by its largest diagonal entry first. An absolute shift of 1e-7 would erase the float32 digits of
    every factor much smaller than one, which is what gradients of 1e-4 make.

    Returns:
        ``Q``, (B, d, d), for a diagonal factor exactly the permutation that sorts the diagonal; and whether the
        decomposition failed and ``last_good`` was kept, (B,).
    """
    diagonal = factors.diagonal(dim1=-2, dim2=-1)
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    shifted = factors / largest_diagonal(factors) + identity * (EIGH_SHIFT[factors.dtype] if shift is None else shift)
    bases, failed = eigenvectors(shifted, last_good)
    is_diagonal = factors.count_nonzero((-2, -1)) == diagonal.count_nonzero(-1)
    permutation = identity[:, diagonal.argsort(dim=-1, descending=True, stable=True)].movedim(1, 0)
    return where_stacked(is_diagonal, permutation, bases), failed & ~is_diagonal


def eigenvectors(matrices: Tensor, last_good: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of symmetric (B, d, d), the largest eigenvalue first; and where ``last_good`` stayed, (B,)."""
    return _rescued("eigh", lambda a: torch.linalg.eigh(a).eigenvectors.flip(-1), matrices, last_good)


def orthonormal_columns(matrices: Tensor, last_good: Tensor) -> tuple[Tensor, Tensor]:
    """``Q`` of the QR decomposition of (B, d, d); and where ``last_good`` stayed, (B,)."""
    # torch.linalg.qr would also spend time on R.
    return _rescued("qr", lambda a: torch.linalg.householder_product(*torch.geqrf(a)), matrices, last_good)


def _rescued(
    name: str, decompose: Callable[[Tensor], Tensor], matrices: Tensor, last_good: Tensor
) -> tuple[Tensor, Tensor]:
    """``decompose(matrices)``, and (B,), where nothing helped and the last good was kept.

    A matrix whose decomposition raises, or returns something that is not finite, is retried alone, in float64, on the
    CPU, and then what was there stays. On an accelerator only what raises is retried: to see more would be to wait.
    """
    result = _attempt(decompose, matrices)
    if result is not None:
        usable = result.sum((-2, -1)).isfinite()  # one pass; a NaN or Inf anywhere stays one
        if result.device.type != "cpu":
            return where_stacked(usable, result, last_good), ~usable
        if bool(usable.all()):
            return result, ~usable
    outcomes = [_rescued_one(name, decompose, m, good) for m, good in zip(matrices, last_good, strict=True)]
    kept = torch.tensor([failed for _, failed in outcomes], device=matrices.device)
    return torch.stack([one for one, _ in outcomes]), kept


def _rescued_one(
    name: str, decompose: Callable[[Tensor], Tensor], matrix: Tensor, last_good: Tensor
) -> tuple[Tensor, bool]:
    """The decomposition of one matrix (d, d), and whether the last good one was kept."""
    for help_from, device, dtype, outcome in (
        ("", matrix.device, matrix.dtype, ""),
        ("float64", matrix.device, torch.float64, "succeeded in float64"),
        ("cpu", "cpu", torch.float64, "succeeded in float64 on the CPU"),
    ):
        result = _attempt(lambda m, device=device, dtype=dtype: decompose(m.to(device, dtype)), matrix)  # type: ignore[misc]
        if result is not None and bool(result.isfinite().all()):
            if help_from:
                _report(name, help_from, matrix, outcome)
            return result.to(matrix), False
    _report(name, "kept", matrix, "failed in float64 and on the CPU too; the last good basis stays")
    return last_good, True


def _attempt(decompose: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor | None:
    try:
        return decompose(matrices)
    except RuntimeError:  # torch.linalg.LinAlgError, no memory left, and the errors of the libraries beneath
        return None


def _report(name: str, help_from: str, matrix: Tensor, outcome: str) -> None:
    message = "%s of a %d x %d Kronecker factor on %s failed and %s."
    report(f"{name} {help_from}", message, name, *matrix.shape, matrix.device, outcome)
