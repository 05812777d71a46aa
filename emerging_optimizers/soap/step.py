"""One step of SOAP and KL-SOAP on a stack of equal tensors: arXiv 2409.11321, algorithm 3.

Its last lines come first: factors and bases are updated before the gradient is projected. The first moment is kept in
the bases, so that it is carried at a refresh instead of projected in every step.

A gradient ``G``, the moments ``M``, ``V`` and the update are (B, d_1, .., d_N); per axis k a Kronecker factor ``K[k]``
and an eigenbasis ``Q[k]`` are (B, d_k, d_k), for the axes that have them. ``finite``, (B,), is false for the tensors
whose gradient cannot be used: their gradient is zero here, everything of them stays as it is, and so does their update,
which is zero. It is None where nothing needs to be held back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from emerging_optimizers.soap.linalg import (
    Stack,
    along,
    project,
    project_back,
    rayleigh_quotients,
    unfold,
    where_stacked,
)
from emerging_optimizers.soap.refresh import first_bases, refresh


def norms(stack: Tensor) -> Tensor:
    """The Euclidean norm of every tensor of a stack, (B,)."""
    found: Tensor = torch.linalg.vector_norm(stack.reshape(len(stack), -1), dim=1)
    return found


def root_mean_squares(stack: Tensor) -> Tensor:
    """The root mean square of every tensor of a stack, (B,)."""
    return norms(stack) / sqrt(max(stack[0].numel(), 1))


def soap_step(
    s: Stack,
    grad: Tensor,
    o: Mapping[str, Any],
    due: Sequence[tuple[slice, Sequence[int]]],
    finite: Tensor | None = None,
    rms: Callable[[Tensor], Tensor] = root_mean_squares,
) -> Tensor:
    """Moves the state of ``s`` by one gradient and returns the update, ready to be subtracted times the learning rate.

    Args:
        s: The state, changed in place.
        grad: ``G``, with the sign and the "l2" penalty of the options; zero where ``finite`` is false.
        o: The options of the parameter group.
        due: Which tensors of the stack are refreshed along which axes.
        finite: The tensors that take part, (B,); None: all.
        rms: The root mean square of every tensor of a stack, (B,), where it takes more than the stack to know it.
    """
    s.step += 1
    update_factors(s, grad, o, finite)
    if due and not s.based:
        first_bases(s, o, finite)
    else:
        for rows, axes in due:
            refresh(s[rows], axes, o, None if finite is None else finite[rows])
            s.refresh_step[rows] = s.step
    direction = adam(project(grad, s.bases), s.M, s.V, s.step, o, finite)
    update = project_back(direction, s.bases)
    if o["max_update_rms"] > 0:  # Adafactor, arXiv 1804.04235, section 6
        update = update * along((o["max_update_rms"] / (rms(update) + 1e-7)).clamp(max=1.0), update)
    return update


def update_factors(s: Stack, grad: Tensor, o: Mapping[str, Any], finite: Tensor | None) -> None:
    """Adds this gradient to the factors, with the options' decay, plain or KL."""
    if not s.K:
        return
    b = o["shampoo_beta"] if o["shampoo_beta"] >= 0 else o["betas"][1]
    correct = o["correct_shampoo_beta_bias"]
    if o["correct_bias"] if correct is None else correct:
        b = 1 - (1 - b) / (1 - b**s.step)
    if o["use_kl_shampoo"]:
        # Without a basis the other factors are the identity, so that 1 / eps never enters the first update.
        add_whitened_grams(s.K, s.bases, grad, b, o["eps"], finite=finite)
    else:
        add_grams(s.K, grad, b, finite)


def add_grams(K: Mapping[int, Tensor], grad: Tensor, b: float, finite: Tensor | None = None) -> None:
    """``K_k <- b K_k + (1 - b) unfold_k(G) unfold_k(G)^T``, in place."""
    for axis, factor in K.items():
        G = unfold(grad, axis)
        if finite is None:
            factor.baddbmm_(G, G.mT, beta=b, alpha=1 - b)
        else:
            factor.lerp_(G @ G.mT, along((1 - b) * finite.to(G.dtype), factor))


def add_whitened_grams(
    K: Mapping[int, Tensor],
    Q: Mapping[int, Tensor],
    grad: Tensor,
    b: float,
    eps: float,
    eigval_exp: float = -1.0,
    finite: Tensor | None = None,
) -> None:
    """KL-Shampoo's factors (arXiv 2509.03378), in place: every other axis is whitened before the Gram product.

    ``K_k <- b K_k + (1 - b) unfold_k(G) (x_{j != k} S_j) unfold_k(G)^T`` with ``S_j = Q_j diag(lam_j**eigval_exp) Q_j^T
    / d_j`` and ``lam_j = max(diag(Q_j^T K_j Q_j), eps)``, all read before any factor moves; ``S_j = I / d_j`` for an
    axis without a basis. ``G S G^T`` is formed as ``H H^T`` with ``H = G S**(1/2)``, which keeps the factor positive
    semi-definite in floating point. Where it would overflow, which takes a gradient far outside of its history, the
    factor stays as it is.
    """
    tiny = torch.finfo(grad.dtype).tiny  # to which eps may round in float32
    roots = {
        axis: Q[axis] * rayleigh_quotients(K[axis], Q[axis]).clamp_min(max(eps, tiny)).pow(eigval_exp / 2).unsqueeze(-2)
        for axis in K.keys() & Q.keys()
    }
    for axis, factor in K.items():
        others = {other: root for other, root in roots.items() if other != axis}
        H = unfold(project(grad, others), axis) / sqrt(grad[0].numel() / grad.shape[1 + axis])
        bounded = torch.linalg.vector_norm(H, dim=(1, 2)) < sqrt(torch.finfo(H.dtype).max)
        moves = bounded if finite is None else bounded & finite
        H = where_stacked(bounded, H, torch.zeros_like(H))
        factor.lerp_(H @ H.mT, along((1 - b) * moves.to(H.dtype), factor))


def adam(grad: Tensor, M: Tensor, V: Tensor, step: int, o: Mapping[str, Any], finite: Tensor | None = None) -> Tensor:
    """Moves both moments and returns ``Mh / (sqrt(Vh) + eps)`` (arXiv 1412.6980; Nesterov: Dozat 2016)."""
    b1, b2 = o["betas"]
    moves = 1.0 if finite is None else along(finite.to(grad.dtype), grad)
    M.lerp_(grad, (1 - b1) * moves)
    V.lerp_(grad.square(), (1 - b2) * moves)
    c1, c1_next, c2 = (1 - b1**step, 1 - b1 ** (step + 1), 1 - b2**step) if o["correct_bias"] else (1.0, 1.0, 1.0)
    numerator = (M * (b1 / c1_next)).add_(grad, alpha=(1 - b1) / c1) if o["use_nesterov"] else M / c1
    direction = numerator.div_((V / c2).sqrt_().add_(o["eps"]))
    return direction if finite is None else where_stacked(finite, direction, torch.zeros_like(direction))
