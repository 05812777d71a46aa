"""A float64 reference of one SOAP step, written to be read beside the algorithm in ``docs/algorithm.md``.

Nothing here is shared with the package, nothing is batched, nothing is in place, nothing is fast: dense matrices,
loops over tensors and axes, one helper per formula. The numbers in the comments are the steps listed there.

What the formulas leave open, and what this oracle (and the package) does:

* ``maximize`` negates the gradient first; ``l2`` then adds ``weight_decay * W``.
* KL factors. An axis without a factor contributes ``S_j = I / d_j``; so does every axis while there is no basis.
  ``eps`` is the optimizer's own. A 1-D tensor has no other axis, so KL and plain are the same there.
* No basis is made while all of a tensor's factors are exactly zero: it would carry no information.
* The adaptive criterion is decided per factor, with the eigenvalue estimates ``diag(Q^T K Q)`` of the current basis, on
  both the ``eigh`` and the orthogonal-iteration path, never at the first refresh. Where it holds, ``Q`` and, along that
  axis, ``V`` stay exactly as they are.
* Orthogonal iteration sorts with a stable descending argsort.
* The Kronecker estimate of ``V`` uses ``diag(Q^T K Q)`` in the new bases, clamped at 0; an axis without a factor
  contributes V's marginal along it; if the product sums to 0, V stays. It is used at the first refresh whatever
  ``second_moment_refresh`` says (without a warm-up V is 0 then), and with ``'kronecker'`` at each later refresh
  in which at least one factor of the tensor was refreshed; factors that were left alone contribute the estimates
  in their kept basis.
* After a refresh ``V`` is raised to what Adam could have beside the carried ``M``.
* ``stagger_updates``: every axis of a tensor has a place in the period, ``place(tensor, axis, frequency)``, and is due
  when the step minus that place is a multiple of the frequency; the first refresh is of all axes at once.
* ``state_dtype``: ``M`` and every ``Q`` are rounded to it at the end of a step.
* ``pack_factors`` is about storage only.
* ``merge_dims`` starts at the last axis and absorbs the left neighbour while the product stays within
  ``max_precond_dim`` and at least two axes remain; otherwise that neighbour starts the next folded axis.
* A tensor whose gradient is ``None`` is passed over, its step does not count.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (tensor index, axis, factor, previous basis or None at the first refresh, the oracle's own new basis) -> basis to use
AdoptBasis = Callable[[int, int, Tensor, "Tensor | None", Tensor], Tensor]


def working_shape(shape: Sequence[int], merge_dims: bool, max_precond_dim: int) -> list[int]:
    """The shape in which the tensor is preconditioned."""
    if not merge_dims or len(shape) < 2:
        return list(shape)
    folded = [shape[-1]]  # built from right to left, its last entry is the axis that is growing
    waiting = list(shape[:-1])
    while waiting:
        neighbour = waiting.pop()
        axes_if_absorbed = len(folded) + len(waiting)
        if folded[-1] * neighbour <= max_precond_dim and axes_if_absorbed >= 2:
            folded[-1] *= neighbour
        else:
            folded.append(neighbour)
    return folded[::-1]


def preconditioned_axes(shape: Sequence[int], precondition_1d: bool, max_precond_dim: int) -> list[int]:
    """The axes of a working shape that have a Kronecker factor."""
    if len(shape) == 0 or (len(shape) == 1 and not precondition_1d):
        return []
    return [axis for axis, d in enumerate(shape) if d <= max_precond_dim]


def unfold(g: Tensor, axis: int) -> Tensor:
    """The d_axis x (product of the others) matricisation."""
    others = [a for a in range(g.ndim) if a != axis]
    return g.permute(axis, *others).reshape(g.shape[axis], math.prod(g.shape[a] for a in others))


def contract(g: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """``out[.., j, ..] = sum_i g[.., i, ..] matrix[i, j]`` along one axis."""
    letters = "abcdefgh"[: g.ndim]
    replaced = letters.replace(letters[axis], "z")
    return torch.einsum(f"{letters},{letters[axis]}z->{replaced}", g, matrix)


def rayleigh(factor: Tensor, basis: Tensor) -> Tensor:
    """``diag(Q^T K Q)``: the factor's eigenvalues as the basis sees them."""
    return torch.diagonal(basis.T @ factor @ basis)


def basis_by_eigh(factor: Tensor) -> Tensor:
    """Eigenvectors, largest eigenvalue first."""
    _, vectors = torch.linalg.eigh(factor + 1e-15 * torch.eye(len(factor), dtype=torch.float64))
    return vectors.flip(1)


def basis_by_orthogonal_iteration(factor: Tensor, sorted_basis: Tensor, power_iter_steps: int) -> Tensor:
    """Householder QR of ``K Q``, repeated."""
    basis = sorted_basis
    for _ in range(power_iter_steps):
        basis, _ = torch.linalg.qr(factor @ basis)
    return basis


def kronecker_estimate(v: Tensor, eigenvalues: dict[int, Tensor]) -> Tensor:
    """The total of ``v`` spread as the product over the axes of eigenvalues, or of v's own marginal without them."""
    product = torch.ones_like(v)
    for axis in range(v.ndim):
        along_axis = eigenvalues[axis].clamp(min=0) if axis in eigenvalues else unfold(v, axis).sum(1)
        as_row = [1] * v.ndim
        as_row[axis] = v.shape[axis]
        product = product * along_axis.reshape(as_row)
    if product.sum() == 0:
        return v
    return v.sum() * product / product.sum()


def rotated(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """Every axis with a basis contracted with its columns."""
    for axis, basis in bases.items():
        x = contract(x, axis, basis)
    return x


def rotated_back(x: Tensor, bases: dict[int, Tensor]) -> Tensor:
    """The inverse of :func:`rotated`."""
    return rotated(x, {axis: basis.T for axis, basis in bases.items()})


class OracleSOAP:
    """SOAP on a list of arrays, which are copied; ``weights`` holds the current values.

    Per-tensor state is a dict: ``t`` steps done, ``M`` and ``V`` in the working shape, ``K`` and ``Q`` dicts from
    axis to factor and basis (``Q`` empty while there is no basis), ``refresh_step`` as in the package (1-based,
    0 for never).
    ``events`` counts what happened, so that a test can assert that an option was really exercised.
    ``adopt_basis``, when given, is asked at every refreshed factor which basis to go on with.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        use_nesterov: bool = False,
        precondition_frequency: int | Callable[[int], int] = 1,
        adam_warmup_steps: int = 0,
        precondition_1d: bool = False,
        correct_bias: bool = True,
        use_eigh: bool = False,
        use_adaptive_criteria: bool = False,
        adaptive_update_tolerance: float = 1e-7,
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        use_kl_shampoo: bool = False,
        correct_shampoo_beta_bias: bool | None = None,
        maximize: bool = False,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        second_moment_refresh: str = "rank",
        stagger_updates: bool = False,
        pack_factors: bool = False,
        state_dtype: torch.dtype | None = None,
        place: Callable[[int, int, int], int] | None = None,
        adopt_basis: AdoptBasis | None = None,
    ) -> None:
        assert weight_decay_method in ("decoupled", "independent", "l2")
        assert second_moment_refresh in ("rank", "kronecker")
        self.weights = [torch.as_tensor(w).detach().to(torch.float64).clone() for w in weights]
        self.lr = lr
        self.beta1, self.beta2 = betas
        self.shampoo_beta = self.beta2 if shampoo_beta < 0 else shampoo_beta
        self.eps = eps
        self.weight_decay = weight_decay
        self.weight_decay_method = weight_decay_method
        self.use_nesterov = use_nesterov
        self.precondition_frequency = precondition_frequency
        self.adam_warmup_steps = adam_warmup_steps
        self.correct_bias = correct_bias
        self.use_eigh = use_eigh
        self.use_adaptive_criteria = use_adaptive_criteria
        self.adaptive_update_tolerance = adaptive_update_tolerance
        self.power_iter_steps = power_iter_steps
        self.max_update_rms = max_update_rms
        self.use_kl_shampoo = use_kl_shampoo
        self.correct_shampoo_beta_bias = (
            correct_bias if correct_shampoo_beta_bias is None else correct_shampoo_beta_bias
        )
        self.maximize = maximize
        self.second_moment_refresh = second_moment_refresh
        self.place = place if stagger_updates else None
        self.state_dtype = torch.float64 if state_dtype is None else state_dtype
        self.adopt_basis = adopt_basis
        self.events = {"refreshed": 0, "left alone": 0, "adopted": 0, "clipped": 0, "not clipped": 0}

        self.state: list[dict] = []
        for w in self.weights:
            shape = working_shape(w.shape, merge_dims, max_precond_dim)
            axes = preconditioned_axes(shape, precondition_1d, max_precond_dim)
            self.state.append(
                {
                    "t": 0,
                    "shape": shape,
                    "M": torch.zeros(shape, dtype=torch.float64),
                    "V": torch.zeros(shape, dtype=torch.float64),
                    "K": {axis: torch.zeros(shape[axis], shape[axis], dtype=torch.float64) for axis in axes},
                    "Q": {},
                    "refresh_step": 0,
                }
            )

    def step(self, grads: Sequence[Tensor | None]) -> None:
        """One step for every tensor that has a gradient."""
        assert len(grads) == len(self.weights)
        for index, grad in enumerate(grads):
            if grad is not None:
                g = torch.as_tensor(grad).detach().to(torch.float64)
                self.weights[index] = self._step_one(index, self.weights[index], g)

    def _step_one(self, index: int, w: Tensor, g: Tensor) -> Tensor:
        s = self.state[index]
        t, i = s["t"], s["t"] + 1

        # 1. sign and regularisation, then everything happens in the working shape
        if self.maximize:
            g = -g
        if self.weight_decay_method == "l2":
            g = g + self.weight_decay * w
        g = g.reshape(s["shape"])

        # 2. - 4. what only preconditioned tensors have
        if s["K"]:
            b = self.shampoo_beta
            if self.correct_shampoo_beta_bias:
                b = 1 - (1 - b) / (1 - b**i)
            s["K"] = self._updated_factors(s, g, b)
            due = self._due_axes(index, s, t)
            if due:
                self._refresh(index, s, i, due)

        # 5. weight decay outside the gradient
        if self.weight_decay_method == "decoupled":
            w = w - self.lr * self.weight_decay * w
        elif self.weight_decay_method == "independent":
            w = w - self.weight_decay * w

        # 6. into the eigenbasis
        g_rot = rotated(g, s["Q"])

        # 7. Adam
        s["M"] = self.beta1 * s["M"] + (1 - self.beta1) * g_rot
        s["V"] = self.beta2 * s["V"] + (1 - self.beta2) * g_rot**2
        now1, next1, now2 = 1 - self.beta1**i, 1 - self.beta1 ** (i + 1), 1 - self.beta2**i
        if not self.correct_bias:
            now1, next1, now2 = 1.0, 1.0, 1.0
        m_hat = s["M"] / now1
        if self.use_nesterov:
            m_hat = self.beta1 * s["M"] / next1 + (1 - self.beta1) * g_rot / now1
        u = m_hat / (torch.sqrt(s["V"] / now2) + self.eps)

        # 8. out of the eigenbasis, and the clip
        u = rotated_back(u, s["Q"])
        if self.max_update_rms > 0:
            factor = min(1.0, self.max_update_rms / (float(torch.sqrt(torch.mean(u**2))) + 1e-7))
            self.events["clipped" if factor < 1 else "not clipped"] += 1
            u = u * factor

        # 9. the step itself, and what is kept of it
        s["M"], s["Q"] = self._as_kept(s["M"]), {axis: self._as_kept(basis) for axis, basis in s["Q"].items()}
        s["t"] = t + 1
        return w - self.lr * u.reshape(w.shape)

    def _as_kept(self, x: Tensor) -> Tensor:
        """Rounded to what the state can hold."""
        return x.to(self.state_dtype).to(torch.float64)

    def _at_least_what_adam_could_have(self, v: Tensor, m: Tensor, updates: int) -> Tensor:
        """V, or M**2 / c where that is more: in a fixed basis Cauchy-Schwarz gives M**2 <= c V.

        c sums, over the updates, the squared weight of a gradient in M over the weight of its square in V.
        """
        if updates == 0:
            return v
        c = sum(((1 - self.beta1) * self.beta1**j) ** 2 / ((1 - self.beta2) * self.beta2**j) for j in range(updates))
        return torch.maximum(v, m**2 / c)

    def _updated_factors(self, s: dict, g: Tensor, b: float) -> dict[int, Tensor]:
        """Step 3, plain and KL. Reads the old factors only, so the order of the axes does not matter."""
        new = {}
        for axis, factor in s["K"].items():
            weighted = g
            if self.use_kl_shampoo and g.ndim >= 2:
                for other in range(g.ndim):
                    if other != axis:
                        weighted = contract(weighted, other, self._kl_weight(s, other))
            new[axis] = b * factor + (1 - b) * unfold(weighted, axis) @ unfold(g, axis).T
        return new

    def _kl_weight(self, s: dict, axis: int) -> Tensor:
        """``S_j``, dense."""
        d = s["shape"][axis]
        if axis not in s["Q"]:
            return torch.eye(d, dtype=torch.float64) / d
        basis = s["Q"][axis]
        lam = rayleigh(s["K"][axis], basis).clamp(min=self.eps)
        return basis @ torch.diag(lam**-1.0) @ basis.T / d

    def _due_axes(self, index: int, s: dict, t: int) -> list[int]:
        if t < self.adam_warmup_steps:
            return []
        if not s["Q"]:
            return list(s["K"]) if any(bool((factor != 0).any()) for factor in s["K"].values()) else []
        f = self._frequency(t)
        if f < 1:
            raise ValueError(f"precondition_frequency must be at least 1, got {f}")
        return [axis for axis in s["K"] if (t - (self.place(index, axis, f) if self.place else 0)) % f == 0]

    def _frequency(self, t: int) -> int:
        f = self.precondition_frequency
        return f(t) if callable(f) else f

    def _refresh(self, index: int, s: dict, i: int, due: Sequence[int]) -> None:
        """Step 4."""
        first = not s["Q"]
        old, new = dict(s["Q"]), {}
        v_permuted = s["V"]
        any_refreshed = False
        for axis, factor in s["K"].items():
            if axis not in due:
                new[axis] = old[axis]
                continue
            if first:
                own, before = basis_by_eigh(factor), None
            else:
                lam = rayleigh(factor, old[axis])
                tolerance = self.adaptive_update_tolerance
                if self.use_adaptive_criteria and torch.norm(lam) >= (1 - tolerance) * torch.norm(factor):
                    new[axis] = old[axis]
                    self.events["left alone"] += 1
                    continue
                if self.use_eigh:
                    own, before = basis_by_eigh(factor), old[axis]
                else:
                    order = torch.argsort(lam, descending=True, stable=True)
                    before = old[axis][:, order]
                    v_permuted = v_permuted.index_select(axis, order)
                    own = basis_by_orthogonal_iteration(factor, before, self.power_iter_steps)
            any_refreshed = True
            self.events["refreshed"] += 1
            new[axis] = own if self.adopt_basis is None else self.adopt_basis(index, axis, factor, before, own)
            self.events["adopted"] += new[axis] is not own

        # M keeps its value in the original space
        s["M"] = rotated(rotated_back(s["M"], old), new)

        if first or (self.second_moment_refresh == "kronecker" and any_refreshed):
            s["V"] = kronecker_estimate(s["V"], {axis: rayleigh(k, new[axis]) for axis, k in s["K"].items()})
        else:
            s["V"] = v_permuted
        s["V"] = self._at_least_what_adam_could_have(s["V"], s["M"], i - 1)
        s["Q"] = new
        s["refresh_step"] = i
