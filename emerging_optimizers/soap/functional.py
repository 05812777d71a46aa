"""The documented functions on one tensor and its lists of factors and bases.

They are the un-batched face of ``step`` and ``refresh``, on a stack of one, and outside of ``torch.autocast``. In a
list, an empty tensor stands for an axis without a factor, whose basis is the identity. Import them from
``emerging_optimizers.soap.soap`` and ``emerging_optimizers.soap.soap_utils``. A list that is none of floating-point
tensors is a TypeError; a shape, length or number that does not fit is a ValueError that names the argument.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.soap.linalg import Stack, project, project_back, rayleigh_quotients, sorted_eigenvectors
from emerging_optimizers.soap.precision import without_autocast
from emerging_optimizers.soap.refresh import basis_holds, new_bases, refresh
from emerging_optimizers.soap.state import working_dtype
from emerging_optimizers.soap.step import add_grams, add_whitened_grams

PROJECT = [[0], [0]]
PROJECT_BACK = [[0], [1]]


@without_autocast()
def precondition(
    grad: Tensor,
    eigenbasis_list: list[Tensor] | None = None,
    dims: list[list[int]] | None = None,
) -> Tensor:
    """Projects a tensor into the eigenbasis, or back out of it (SOAP, arXiv 2409.11321, algorithm 3).

    The first axis of the running tensor is contracted with each basis in turn and goes to the end, so that after N
    bases the axes are back in order: ``Q_1^T G Q_2`` for a matrix, ``Q_1 G Q_2^T`` on the way back.

    Args:
        grad: (d_1, .., d_N).
        eigenbasis_list: One (d_k, d_k) basis per axis, eigenvectors as columns. None: ``grad`` is returned.
        dims: ``[[0], [0]]`` (default) projects in, ``[[0], [1]]`` projects back.

    Returns:
        A tensor of ``grad``'s shape, in the promoted dtype of ``grad`` and bases, at least float32.

    Example:
        >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> precondition(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), [swap, torch.empty(0)])
        tensor([[3., 4.],
                [1., 2.]])
    """
    _check_tensor("grad", grad)
    directions: object = dims
    if directions is not None and not (isinstance(directions, list) and directions in (PROJECT, PROJECT_BACK)):
        raise ValueError(f"dims must be {PROJECT} (project) or {PROJECT_BACK} (project back), got {dims}")
    if eigenbasis_list is None:
        return grad
    _check_matches("eigenbasis_list", eigenbasis_list, grad.shape, "grad")
    dtype = working_dtype(grad, *eigenbasis_list)
    contract = project_back if dims == PROJECT_BACK else project
    return contract(_stack(grad, dtype), _stacks(eigenbasis_list, dtype)).squeeze(0)


def init_kronecker_factors(grad: Tensor, precondition_1d: bool = False) -> list[Tensor]:
    """Kronecker factors of zeros for a gradient (SOAP, arXiv 2409.11321, section 4).

    Args:
        grad: (d_1, .., d_N). Only shape, device and dtype are read.
        precondition_1d: Whether a 1-D gradient gets a factor; otherwise its list has one empty tensor.

    Returns:
        One (d_k, d_k) tensor per axis on the gradient's device, float64 for a float64 gradient, else float32.

    Example:
        >>> [tuple(factor.shape) for factor in init_kronecker_factors(torch.zeros(2, 3))]
        [(2, 2), (3, 3)]
    """
    _check_tensor("grad", grad)
    dtype = working_dtype(grad)
    if grad.dim() == 1 and not precondition_1d:
        return [torch.empty(0, dtype=dtype, device=grad.device)]
    return [torch.zeros(size, size, dtype=dtype, device=grad.device) for size in grad.shape]


@without_autocast()
@torch.no_grad()
def update_kronecker_factors(
    kronecker_factor_list: list[Tensor],
    grad: Tensor,
    shampoo_beta: float,
    precondition_1d: bool = False,
) -> None:
    """``K_k <- beta K_k + (1 - beta) unfold_k(G) unfold_k(G)^T``, in place (SOAP, arXiv 2409.11321, algorithm 3).

    Args:
        kronecker_factor_list: One (d_k, d_k) factor per axis; modified in place.
        grad: ``G``, (d_1, .., d_N).
        shampoo_beta: The decay, in [0, 1].
        precondition_1d: Without it a 1-D gradient changes nothing.

    Example:
        >>> grad = torch.tensor([[1.0, 2.0]])
        >>> factors = init_kronecker_factors(grad)
        >>> update_kronecker_factors(factors, grad, shampoo_beta=0.5)
        >>> factors
        [tensor([[2.5000]]), tensor([[0.5000, 1.0000],
                [1.0000, 2.0000]])]
    """
    _check_tensor("grad", grad)
    _check_matches("kronecker_factor_list", kronecker_factor_list, grad.shape, "grad")
    _check_number("shampoo_beta", shampoo_beta, 0, 1, "between 0 and 1")
    if grad.dim() == 1 and not precondition_1d:
        return
    dtype = working_dtype(grad, *kronecker_factor_list)
    working = _stacks(kronecker_factor_list, dtype)
    add_grams(working, _stack(grad, dtype), shampoo_beta)
    _write_back(kronecker_factor_list, working)


@without_autocast()
@torch.no_grad()
def update_kronecker_factors_kl_shampoo(
    kronecker_factor_list: list[Tensor],
    grad: Tensor,
    shampoo_beta: float,
    eigenbasis_list: list[Tensor],
    eps: float,
    eigval_exp: float = -1.0,
) -> None:
    """KL-Shampoo's update of the factors, in place (arXiv 2509.03378).

    ``lam_j = max(diag(Q_j^T K_j Q_j), eps)``, ``S_j = Q_j diag(lam_j**eigval_exp) Q_j^T / d_j``, and for a matrix
    ``K_1 <- b K_1 + (1 - b) G S_2 G^T``, ``K_2 <- b K_2 + (1 - b) G^T S_1 G``, both from the factors as they were.
    With more axes every other axis is contracted with its own ``S_j``. A 1-D gradient is a TypeError.

    Args:
        kronecker_factor_list: One (d_k, d_k) factor per axis; modified in place.
        grad: ``G``, with two axes or more.
        shampoo_beta: The decay ``b``, in [0, 1].
        eigenbasis_list: One orthonormal basis per axis; an empty one takes part with ``S_j = I / d_j``.
        eps: The smallest eigenvalue used, greater than 0.
        eigval_exp: The exponent of the eigenvalues.

    Example:
        >>> factors, identity = [2 * torch.eye(2), 4 * torch.eye(2)], [torch.eye(2), torch.eye(2)]
        >>> update_kronecker_factors_kl_shampoo(factors, torch.eye(2), 0.0, identity, eps=1e-8)
        >>> [round(factor[0, 0].item(), 6) for factor in factors]
        [0.125, 0.25]
    """
    _check_tensor("grad", grad)
    if grad.dim() < 2:
        raise TypeError(f"grad must have at least 2 axes for KL-Shampoo, got shape {tuple(grad.shape)}")
    _check_matches("kronecker_factor_list", kronecker_factor_list, grad.shape, "grad")
    _check_matches("eigenbasis_list", eigenbasis_list, grad.shape, "grad")
    _check_number("shampoo_beta", shampoo_beta, 0, 1, "between 0 and 1")
    _check_number("eps", eps, sys.float_info.min, sys.float_info.max, "finite and greater than 0")
    _check_number("eigval_exp", eigval_exp, -sys.float_info.max, sys.float_info.max, "finite")
    dtype = working_dtype(grad, *kronecker_factor_list)
    working = _stacks(kronecker_factor_list, dtype)
    bases = _stacks(eigenbasis_list, dtype)
    add_whitened_grams(working, bases, _stack(grad, dtype), shampoo_beta, eps, eigval_exp)
    _write_back(kronecker_factor_list, working)


@without_autocast()
@torch.no_grad()
def update_eigenbasis_and_momentum(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor] | None,
    exp_avg_sq: Tensor,
    momentum: Tensor,
    use_eigh: bool = False,
    use_adaptive_criteria: bool = False,
    adaptive_update_tolerance: float | None = None,
    power_iter_steps: int = 1,
    convert_to_float: bool = True,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """One basis refresh of one tensor: new eigenbases, and the moments carried into them.

    ``M`` is carried exactly. ``V`` is aligned by eigenvalue rank, or, at the switch from the original space, becomes
    ``V_ij <- sum(V) lam_i mu_j / sum(lam_i mu_j)``. The optimizer also raises ``V`` to a floor, which needs the betas.

    Source: SOAP, arXiv 2409.11321, algorithms 3 and 4, but for ``V`` (see the algorithm page).

    Args:
        kronecker_factor_list: One (d_k, d_k) factor per axis.
        eigenbasis_list: The present bases. None: the moments are in the original space, and ``eigh`` is used.
        exp_avg_sq: ``V``, (d_1, .., d_N), in the present bases; updated in place, and returned.
        momentum: ``M``, likewise.
        use_eigh: Decompose every time instead of iterating.
        use_adaptive_criteria: See ``get_eigenbasis_qr``.
        adaptive_update_tolerance: The tolerance of that criterion, in [0, 1].
        power_iter_steps: Power steps of the orthogonal iteration, at least 1.
        convert_to_float: Return float32 bases. Otherwise bases have their factor's dtype.

    Returns:
        The new bases, ``momentum`` and ``exp_avg_sq``.

    Example:
        >>> factors = [torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([2.0, 2.0]))]
        >>> update_eigenbasis_and_momentum(factors, None, torch.ones(2, 2), torch.eye(2))[1:]
        (tensor([[0., 1.],
                [1., 0.]]), tensor([[1.5000, 1.5000],
                [0.5000, 0.5000]]))
    """
    _check_tensor("exp_avg_sq", exp_avg_sq)
    _check_tensor("momentum", momentum)
    if momentum.shape != exp_avg_sq.shape:
        raise ValueError(
            f"momentum must have the shape of exp_avg_sq, {tuple(exp_avg_sq.shape)}, got {tuple(momentum.shape)}"
        )
    _check_matches("kronecker_factor_list", kronecker_factor_list, exp_avg_sq.shape, "exp_avg_sq")
    if eigenbasis_list is not None:
        _check_matches("eigenbasis_list", eigenbasis_list, exp_avg_sq.shape, "exp_avg_sq")
    options = _refresh_options(use_eigh, use_adaptive_criteria, adaptive_update_tolerance, power_iter_steps)
    dtype = working_dtype(exp_avg_sq, momentum, *kronecker_factor_list)
    K = _stacks(kronecker_factor_list, dtype)
    Q = {axis: _stack(_basis(factor[0], eigenbasis_list, axis), dtype).clone() for axis, factor in K.items()}
    M, V, counter = _stack(momentum, dtype), _stack(exp_avg_sq, dtype), torch.zeros(1, device=momentum.device)
    stack = Stack(
        1, eigenbasis_list is not None, M, V, K, Q, refresh_step=counter, failed=counter
    )  # no floor at step 1
    if K:
        refresh(stack, list(K), options)
    momentum.copy_(M.squeeze(0))
    exp_avg_sq.copy_(V.squeeze(0))
    bases = [
        Q[axis].squeeze(0).to(torch.float32 if convert_to_float else factor.dtype) if axis in Q else factor.clone()
        for axis, factor in enumerate(kronecker_factor_list)
    ]
    return bases, momentum, exp_avg_sq


@without_autocast()
@torch.no_grad()
def get_eigenbasis_eigh(
    kronecker_factor_list: list[Tensor],
    convert_to_float: bool = True,
    eigenbasis_list: list[Tensor] | None = None,
    use_adaptive_criteria: bool = False,
    adaptive_update_tolerance: float | None = None,
    eps: float | None = None,
) -> list[Tensor]:
    """Eigenvectors of every factor by eigendecomposition, columns in descending order of eigenvalue.

    Never fails on a matrix that ``torch.linalg.eigh`` rejects: it is retried in float64, then on the CPU, and then
    the old basis (or the identity) is kept; one warning is logged and ``emerging_optimizers.soap.incidents`` counts.

    Args:
        kronecker_factor_list: One symmetric (d_k, d_k) factor per axis. Only the lower triangle is read.
        convert_to_float: Return float32. Otherwise bases have their factor's dtype.
        eigenbasis_list: The present bases, needed for the adaptive criterion and kept where no decomposition succeeds.
        use_adaptive_criteria: See ``get_eigenbasis_qr``.
        adaptive_update_tolerance: The tolerance of that criterion, in [0, 1].
        eps: Shift of the diagonal before decomposition, relative to the factor's largest diagonal entry. Default
            1e-7 for float32 (and lower) and 1e-15 for float64.

    Returns:
        One orthonormal (d_k, d_k) basis per axis; for a diagonal factor exactly a permutation of the identity.

    Example:
        >>> get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 3.0, 2.0]))])[0]
        tensor([[0., 0., 1.],
                [1., 0., 0.],
                [0., 1., 0.]])
    """
    _check_square("kronecker_factor_list", kronecker_factor_list)
    options = _refresh_options(True, use_adaptive_criteria, adaptive_update_tolerance)
    if use_adaptive_criteria and eigenbasis_list is None:
        raise ValueError("eigenbasis_list must be given when use_adaptive_criteria is set, got None")
    if eigenbasis_list is not None:
        _check_pairs("eigenbasis_list", eigenbasis_list, "kronecker_factor_list", kronecker_factor_list)
    if eps is not None:
        _check_number("eps", eps, 0, torch.finfo(torch.float32).max, "finite and at least 0")
    bases = []
    for axis, factor in enumerate(kronecker_factor_list):
        basis = factor
        if factor.numel():
            dtype = working_dtype(factor)
            K, Q = _stack(factor, dtype), _stack(_basis(factor, eigenbasis_list, axis), dtype)
            tolerance = options["adaptive_update_tolerance"]
            if not use_adaptive_criteria or not bool(basis_holds(K, rayleigh_quotients(K, Q), tolerance)):
                Q, _ = sorted_eigenvectors(K, Q, eps)
            basis = Q[0].contiguous()
        bases.append(basis.to(torch.float32 if convert_to_float else factor.dtype))
    return bases


@without_autocast()
@torch.no_grad()
def get_eigenbasis_qr(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    exp_avg_sq: Tensor,
    convert_to_float: bool = True,
    use_adaptive_criteria: bool = False,
    adaptive_update_tolerance: float | None = None,
    power_iter_steps: int = 1,
) -> tuple[list[Tensor], Tensor]:
    """One round of orthogonal iteration for every factor (SOAP, arXiv 2409.11321, algorithm 4).

    ``lam = diag(Q^T K Q)``; the columns of ``Q``, and ``exp_avg_sq`` along that axis, are sorted by descending
    ``lam``; then ``power_iter_steps`` times ``Q <- qr(K Q).Q``.

    Args:
        kronecker_factor_list: One symmetric (d_k, d_k) factor per axis.
        eigenbasis_list: The present orthonormal bases, shaped like the factors.
        exp_avg_sq: Adam's second moment in these bases, (d_1, .., d_N). Not modified.
        convert_to_float: Return float32 bases. Otherwise bases have their factor's dtype.
        use_adaptive_criteria: Leave a basis, and ``exp_avg_sq`` along its axis, alone where
            ``norm(lam) >= (1 - adaptive_update_tolerance) * frobenius(K)`` (arXiv 2506.03595).
        adaptive_update_tolerance: The tolerance of that criterion, in [0, 1].
        power_iter_steps: Number of power steps, at least 1.

    Returns:
        The bases and the re-ordered second moment.

    Example:
        >>> factor = torch.diag(torch.tensor([1.0, 2.0]))
        >>> (basis,), exp_avg_sq = get_eigenbasis_qr([factor], [torch.eye(2)], torch.tensor([0.1, 0.2]))
        >>> basis.abs(), exp_avg_sq
        (tensor([[0., 1.],
                [1., 0.]]), tensor([0.2000, 0.1000]))
    """
    _check_square("kronecker_factor_list", kronecker_factor_list)
    _check_pairs("eigenbasis_list", eigenbasis_list, "kronecker_factor_list", kronecker_factor_list)
    _check_tensor("exp_avg_sq", exp_avg_sq)
    _check_matches("kronecker_factor_list", kronecker_factor_list, exp_avg_sq.shape, "exp_avg_sq")
    options = _refresh_options(False, use_adaptive_criteria, adaptive_update_tolerance, power_iter_steps)
    bases = []
    for axis, (factor, old) in enumerate(zip(kronecker_factor_list, eigenbasis_list, strict=True)):
        basis = factor
        if factor.numel():
            dtype = working_dtype(factor)
            Q, order, *_ = new_bases(_stack(factor, dtype), _stack(old, dtype), True, options)
            basis = Q[0].contiguous()
            if order is not None:
                exp_avg_sq = exp_avg_sq.index_select(axis, order[0])
        bases.append(basis.to(torch.float32 if convert_to_float else factor.dtype))
    return bases, exp_avg_sq


def _refresh_options(
    use_eigh: bool, use_adaptive_criteria: bool, adaptive_update_tolerance: float | None, power_iter_steps: int = 1
) -> dict[str, Any]:
    """The options that a refresh reads, as a parameter group has them; raises where one is missing or impossible."""
    if use_adaptive_criteria:
        if adaptive_update_tolerance is None:
            raise ValueError(
                "adaptive_update_tolerance must be a number >= 0 when use_adaptive_criteria is set, got None"
            )
        _check_number("adaptive_update_tolerance", adaptive_update_tolerance, 0, 1, "between 0 and 1")
    steps: object = power_iter_steps
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"power_iter_steps must be an integer, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"power_iter_steps must be at least 1, got {steps}")
    return {
        "use_eigh": use_eigh,
        "use_adaptive_criteria": use_adaptive_criteria,
        "adaptive_update_tolerance": adaptive_update_tolerance,
        "power_iter_steps": steps,
        "qr_fp32_matmul_prec": "high",
        "second_moment_refresh": "rank",
        "betas": (0.0, 0.0),
    }


def _basis(factor: Tensor, eigenbasis_list: Sequence[Tensor] | None, axis: int) -> Tensor:
    """The basis of an axis, the identity where there is none yet."""
    if eigenbasis_list is None or eigenbasis_list[axis].numel() == 0:
        return torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return eigenbasis_list[axis]


def _stack(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A stack of one, a view where the dtype is right already."""
    return tensor.to(dtype).unsqueeze(0)


def _stacks(matrices: Sequence[Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
    """Stacks of one, by axis; none for an empty tensor."""
    return {axis: _stack(matrix, dtype) for axis, matrix in enumerate(matrices) if matrix.numel()}


def _write_back(targets: Sequence[Tensor], working: Mapping[int, Tensor]) -> None:
    """Copies results into tensors whose dtype kept the kernels from working on them in place."""
    for axis, result in working.items():
        if result.data_ptr() != targets[axis].data_ptr():
            targets[axis].copy_(result.squeeze(0))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {value.layout}")


def _check_square(name: str, matrices: Sequence[Tensor]) -> None:
    """Raises unless every element is a square matrix or an empty tensor (an axis without a factor)."""
    if not isinstance(matrices, list | tuple):
        raise TypeError(f"{name} must be a list of Tensors, got {type(matrices).__name__}")
    for k, matrix in enumerate(matrices):
        _check_tensor(f"{name}[{k}]", matrix)
        if matrix.numel() and (matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]):
            raise ValueError(f"{name}[{k}] must be a square matrix or empty, got shape {tuple(matrix.shape)}")


def _check_matches(name: str, matrices: Sequence[Tensor], shape: Sequence[int], shape_of: str) -> None:
    """Raises unless ``matrices`` has one square matrix of the right size, or an empty tensor, per axis of ``shape``."""
    _check_square(name, matrices)
    if len(matrices) != len(shape):
        raise ValueError(
            f"{name} must have one entry per axis of {shape_of}: got {len(matrices)} for shape {tuple(shape)}"
        )
    for k, (matrix, size) in enumerate(zip(matrices, shape, strict=True)):
        if matrix.numel() and tuple(matrix.shape) != (size, size):
            raise ValueError(
                f"{name}[{k}] must have shape {(size, size)} for axis {k} of {shape_of}, got {tuple(matrix.shape)}"
            )


def _check_pairs(name: str, matrices: Sequence[Tensor], other_name: str, others: Sequence[Tensor]) -> None:
    """Raises unless two lists have the same length and shapes."""
    _check_square(name, matrices)
    if len(matrices) != len(others):
        raise ValueError(f"{name} must be as long as {other_name} ({len(others)}), got {len(matrices)}")
    for k, (got, wanted) in enumerate(zip((m.shape for m in matrices), (o.shape for o in others), strict=True)):
        if got != wanted:
            raise ValueError(f"{name}[{k}] must have the shape of {other_name}[{k}], {tuple(wanted)}, got {tuple(got)}")


def _check_number(name: str, value: object, low: float, high: float, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be {wanted}, got {value}")
