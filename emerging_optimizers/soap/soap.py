"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, arXiv 2409.11321."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.soap.agreement import check_gradients_agree, check_parameters, first_unusable_gradient
from emerging_optimizers.soap.checkpoint import load_exactly, with_plain_options
from emerging_optimizers.soap.functional import (
    init_kronecker_factors,
    precondition,
    update_eigenbasis_and_momentum,
    update_kronecker_factors,
    update_kronecker_factors_kl_shampoo,
)
from emerging_optimizers.soap.layout import layout_for
from emerging_optimizers.soap.options import check_params, name_of, validate_options, warn_of_misspelt_options
from emerging_optimizers.soap.ownership import place_parameters
from emerging_optimizers.soap.placement import Grid, Grids, local_tensor, warn_if_flattened
from emerging_optimizers.soap.rounds import Plan
from emerging_optimizers.soap.shared_state import share_states
from emerging_optimizers.soap.state import fits, is_elsewhere
from emerging_optimizers.soap.timing import STAGGER_PROCESSES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "SOAP",
    "init_kronecker_factors",
    "precondition",
    "update_eigenbasis_and_momentum",
    "update_kronecker_factors",
    "update_kronecker_factors_kl_shampoo",
]


class SOAP(WeightDecayMixin, Optimizer):
    r"""SOAP, ShampoO with Adam in the Preconditioner's eigenbasis, and KL-SOAP.

    One step for a matrix :math:`W` with gradient :math:`G`, in this order (arXiv 2409.11321, algorithm 3):

    .. math::
        \begin{aligned}
        & K_1 \leftarrow \beta_s K_1 + (1-\beta_s)\, G G^\top, \quad
          K_2 \leftarrow \beta_s K_2 + (1-\beta_s)\, G^\top G \\
        & \text{if } t \bmod f = 0: \quad Q_k \leftarrow \mathrm{qr}(K_k Q_k), \quad
          M, V \text{ carried into the new bases} \\
        & G' \leftarrow Q_1^\top G\, Q_2 \\
        & M \leftarrow \beta_1 M + (1-\beta_1) G', \quad V \leftarrow \beta_2 V + (1-\beta_2)\, G' \odot G' \\
        & W \leftarrow W - \eta\, Q_1 \left(\hat M / (\sqrt{\hat V} + \epsilon)\right) Q_2^\top
        \end{aligned}

    Tensors of any number of axes are preconditioned along each axis. A tensor with no preconditioned axis (0-D; 1-D
    unless ``precondition_1d``; every axis longer than ``max_precond_dim``) gets plain AdamW and no factor state.
    The arithmetic is float32 whatever the parameter's dtype, and float64 for float64 parameters. Every option may
    differ per parameter group.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate :math:`\eta`; a number or a tensor of one element.
        betas: Decay of the first and the second moment.
        shampoo_beta: Decay :math:`\beta_s` of the Kronecker factors; negative: ``betas[1]``.
        eps: Added to the root of the second moment; with KL factors also the smallest eigenvalue used.
        weight_decay: Weight decay coefficient.
        weight_decay_method: "decoupled" (AdamW), "independent" (not multiplied by ``lr``) or "l2".
        use_nesterov: Nesterov's look-ahead in the first moment (Dozat 2016).
        precondition_frequency: Refresh the eigenbases every so many steps: an integer, or a callable from the 0-based
            step to an integer (see ``emerging_optimizers.schedules``).
        adam_warmup_steps: Steps of plain Adam, in the original space, before the first eigenbasis.
        precondition_1d: Precondition 1-D tensors too.
        correct_bias: Adam's bias correction.
        fp32_matmul_prec: Precision of projections and Gram products: "highest", "high" or "medium".
        use_eigh: Refresh by eigendecomposition; otherwise by orthogonal iteration.
        qr_fp32_matmul_prec: Precision of the products in power steps after the first. Eigenvalues are always float32.
        use_adaptive_criteria: Leave a basis alone while it still diagonalises its factor (arXiv 2506.03595).
        adaptive_update_tolerance: The tolerance of that criterion.
        power_iter_steps: Power steps per refresh of the orthogonal iteration.
        max_update_rms: Scale an update down to this root mean square (arXiv 1804.04235); 0: never.
        use_kl_shampoo: KL-Shampoo's factors (arXiv 2509.03378).
        correct_shampoo_beta_bias: Bias correction of the factors' decay; None: as ``correct_bias``.
        maximize: Maximize the objective.
        max_precond_dim: An axis longer than this keeps the identity basis and no factor. 0 makes the group plain
            AdamW, which is how embeddings and heads are routed (``emerging_optimizers.routing``).
        merge_dims: Fold adjacent axes, last first, while their product stays within ``max_precond_dim`` and at least
            two axes remain: a convolution becomes the matrix (out, in * kh * kw).
        second_moment_refresh: The second moment at a refresh: "rank" aligns it by rank of eigenvalue, "kronecker"
            replaces it by the Kronecker estimate of the same total.
        nonfinite: A tensor whose gradient has NaN or Inf, or overflows when squared: "skip" leaves its weight, moments,
            factors and bases as they are and counts it in the state; "raise" raises before anything has changed;
            "propagate" computes on.
        stagger_updates: Spread the refreshes over the period, so that all steps take about as long. Every axis of every
            tensor is still refreshed each ``precondition_frequency`` steps; in which of them follows from the parameter
            list and the number of processes that share it, which the group keeps under "stagger_processes". Without
            it all are refreshed in the same step.
        pack_factors: Keep each symmetric Kronecker factor as one triangle, and expand it while it is worked on. Halves
            the factors' memory; results differ by the rounding by which a factor's two triangles differ. Costs a copy
            of the factor out and in again per step. Cannot change after the first step.
        state_dtype: In which the first moment and the eigenbases are kept: ``torch.bfloat16`` halves their memory,
            None is the working dtype, and ``torch.float32`` is for float64 parameters. The arithmetic stays in the
            working dtype, for which a copy is made at each step, and what is kept is rounded once when it is stored.
            A bfloat16 first moment stands still where a step would change it by less than 0.2 to 0.4%, so ``betas[0]``
            must stay well below 0.996. The adaptive criterion sees the rounding of a basis, about 1e-3, which is what
            its tolerance should then be at least.
        process_group: The processes that hold every plain tensor among the parameters, with the same gradients, as DDP
            leaves them: a process group or a mesh of one dimension. Each matrix is then worked on, and its state kept,
            by one of them, which sends the others its new weights. DTensors (FSDP2, HSDP, tensor parallelism) bring
            their mesh along and need no argument. Not an option of a group, and not saved. With several processes the
            constructor, ``step``, ``state_dict`` and ``load_state_dict`` must be called by all.

    State, per parameter: ``step``, the steps done, 0-D float64 on the CPU; ``exp_avg`` and ``exp_avg_sq``, shaped like
    the parameter and held in the eigenbasis once there is one; ``skipped_steps``, 0-D int64. Preconditioned tensors
    also have ``refresh_step``, the value of ``step`` after the last refresh that was due, 0 before the first;
    ``failed_refreshes``, 0-D
    int64, the refreshes in which a decomposition failed for good and the last good basis stayed; and for each
    preconditioned axis k of the working shape ``GG_k`` and ``Q_k``, (d_k, d_k); packed, ``GG_k`` is
    (d_k (d_k + 1) / 2,), see ``emerging_optimizers.soap.packing``. ``exp_avg`` and ``Q_k`` are in
    ``state_dtype``, all else but the counters in the working dtype. They are views into stacks that parameters share:
    clone them before saving the state of a single one. What was skipped or failed is logged once per kind and counted
    for the process in ``emerging_optimizers.soap.incidents``. Where another process works on a parameter, all but
    ``step`` are empty tensors here; ``state_dict`` has them whole.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an impossible value.
        RuntimeError: Processes that hold the same parameters have different lists of them.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> optimizer = SOAP([weight], lr=0.1, weight_decay=0.0, precondition_frequency=10)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 1e-2
        True
    """

    #: Whether this instance is inside ``step``, whose hooks have then been run.
    _stepping = False
    #: The last step's. Nothing but a cache: it is made from the state.
    _plan: Plan | None = None
    #: Whether the constructor is done, which compares its groups with other processes' all at once.
    _constructed = False
    #: Which parameters had a gradient when the processes last compared.
    _grad_patterns: Mapping[Grid, str] = {}

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.95),
        shampoo_beta: float = 0.95,
        eps: float = 1e-08,
        weight_decay: float = 0.01,
        *,
        weight_decay_method: str = "decoupled",
        use_nesterov: bool = False,
        precondition_frequency: int | Callable[[int], int] = 1,
        adam_warmup_steps: int = 0,
        precondition_1d: bool = False,
        correct_bias: bool = True,
        fp32_matmul_prec: str = "high",
        use_eigh: bool = False,
        qr_fp32_matmul_prec: str = "high",
        use_adaptive_criteria: bool = False,
        adaptive_update_tolerance: float = 1e-07,
        power_iter_steps: int = 1,
        max_update_rms: float = 0.0,
        use_kl_shampoo: bool = False,
        correct_shampoo_beta_bias: bool | None = None,
        maximize: bool = False,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        second_moment_refresh: str = "rank",
        nonfinite: str = "skip",
        stagger_updates: bool = False,
        pack_factors: bool = False,
        state_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight_decay_method": weight_decay_method,
            "use_nesterov": use_nesterov,
            "precondition_frequency": precondition_frequency,
            "adam_warmup_steps": adam_warmup_steps,
            "precondition_1d": precondition_1d,
            "correct_bias": correct_bias,
            "fp32_matmul_prec": fp32_matmul_prec,
            "use_eigh": use_eigh,
            "qr_fp32_matmul_prec": qr_fp32_matmul_prec,
            "use_adaptive_criteria": use_adaptive_criteria,
            "adaptive_update_tolerance": adaptive_update_tolerance,
            "power_iter_steps": power_iter_steps,
            "max_update_rms": max_update_rms,
            "use_kl_shampoo": use_kl_shampoo,
            "correct_shampoo_beta_bias": correct_shampoo_beta_bias,
            "maximize": maximize,
            "max_precond_dim": max_precond_dim,
            "merge_dims": merge_dims,
            "second_moment_refresh": second_moment_refresh,
            "nonfinite": nonfinite,
            "stagger_updates": stagger_updates,
            "pack_factors": pack_factors,
            "state_dtype": state_dtype,
        }
        check_params(params)
        validate_options(defaults)
        self._grids = Grids(process_group)
        super().__init__(params, defaults)
        check_parameters(self.param_groups, self._grids)
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, with this optimizer's defaults for the options that it does not set.

        Raises:
            TypeError: An option or a parameter has the wrong type.
            ValueError: An option has an impossible value, or a parameter is in a group already.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            validate_options({**self.defaults, **param_group})
            warn_of_misspelt_options(param_group, self.defaults)
        super().add_param_group(param_group)
        for index, parameter in enumerate(self.param_groups[-1]["params"]):
            warn_if_flattened(parameter, name_of(self.param_groups[-1], index))
        if self._constructed:
            check_parameters(self.param_groups, self._grids)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_grids": self._grids}

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, for ``torch.save`` and ``torch.load(weights_only=True)``.

        A ``precondition_frequency`` that is a callable is not part of it. Where several processes hold a parameter,
        the tensors are DTensors, and every process must call this.
        """
        self._place_parameters()
        if not (self._grids.places or self._grids.have_dtensors):
            return with_plain_options(super().state_dict())

        def share(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            numbers = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
            shared = share_states(self.param_groups, self.state, self._grids.places)
            return {**state_dict, "state": {numbers[parameter]: state for parameter, state in shared.items()}}

        handle = self.register_state_dict_post_hook(share, prepend=True)  # before the user's
        try:
            return with_plain_options(super().state_dict())
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of a state, each tensor in the dtype that it has here, whatever the parameter's.

        The saved options replace the optimizer's own, but for a ``precondition_frequency`` that is or was a callable:
        there the optimizer's own is kept, with a warning if only one of the two is a callable. A state without
        entries, or from before an option existed, is accepted; the optimizer's own ``pack_factors`` and
        ``state_dtype`` are then applied to it.

        Args:
            state_dict: As returned by :meth:`state_dict`.

        Raises:
            TypeError: Something in it has the wrong type.
            ValueError: Groups, options, keys or shapes do not fit. Nothing has changed then.
        """
        self._grids.places = load_exactly(self, super().load_state_dict, state_dict, self._grids)
        self._plan = None  # or the old state would live on beside the new one until the next step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Does one optimization step.

        Args:
            closure: Evaluates the model and returns the loss; called once, with gradients enabled.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A gradient is sparse or complex, or, with ``nonfinite="raise"``, not finite; or options that
                decide about a tensor's layout were changed after its first step.
            TypeError, ValueError: An option was changed to an impossible value.
                Nothing has been changed in any of these cases.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            validate_options(group)  # a scheduler or a user may have changed them
        self._place_parameters()
        self._grad_patterns = check_gradients_agree(self.param_groups, self._grids.places, self._grad_patterns)
        for group in self.param_groups:
            self._check_gradients(group)
        plan = self._plan = Plan(self.param_groups, self.state, self._grids.places, self._plan)
        plan.step(self.param_groups, self.state)
        return loss

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a ``step`` as torch does, for hooks and the profiler, except where a subclass's ``step`` calls it.

        torch wraps the ``step`` of every class that an optimizer was made of, and would run the hooks once per level.
        """
        hooked = Optimizer.profile_hook_step(func)

        @functools.wraps(hooked)
        def once(self: SOAP, *args: Any, **kwargs: Any) -> Any:
            if self._stepping:
                return func(self, *args, **kwargs)
            self._stepping = True
            try:
                return hooked(self, *args, **kwargs)
            finally:
                self._stepping = False

        # A step branches on its counters and reads them: traced, it would be compiled anew and gain nothing.
        disabled: Callable[..., Any] = torch.compiler.disable(once)  # type: ignore[no-untyped-call]
        return disabled

    def _check_gradients(self, group: dict[str, Any]) -> None:
        """Raises what a step could raise about a parameter, before it changes anything."""
        for index, parameter in enumerate(group["params"]):
            state, layout = self.state.get(parameter, {}), layout_for(parameter, group)
            held = parameter if layout.axes else local_tensor(parameter)
            if "step" in state and not is_elsewhere(state) and not fits(state, layout, held, group["pack_factors"]):
                raise RuntimeError(
                    f"The state of {name_of(group, index)} has another shape or other preconditioned axes than its "
                    "shape, max_precond_dim, merge_dims, precondition_1d and pack_factors now give; they cannot change "
                    "after the first step"
                )
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout != torch.strided or grad.is_complex():
                kind = "complex" if grad.is_complex() else "sparse"
                raise RuntimeError(f"SOAP does not support {kind} gradients, got one for {name_of(group, index)}")
        if group["nonfinite"] == "raise":
            unusable = first_unusable_gradient(group, self._grids.places)
            if unusable is not None:
                raise RuntimeError(f"The gradient of {name_of(group, unusable)} has NaN or Inf entries, or overflows")

    def _place_parameters(self) -> None:
        """Says of every parameter which process works on it. Those that have a place keep it."""
        parameters = (parameter for group in self.param_groups for parameter in group["params"])
        if any(p not in self._grids.places and self._grids.of(p) is not None for p in parameters):
            self._grids.places = place_parameters(self.param_groups, self._grids, self._grids.places)
        for group in self.param_groups:
            if group["stagger_updates"] is True and STAGGER_PROCESSES not in group:
                sizes = [self._grids.places[p].grid.size for p in group["params"] if p in self._grids.places]
                group[STAGGER_PROCESSES] = max(sizes, default=1)
