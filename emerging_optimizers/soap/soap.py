"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, arXiv 2409.11321."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import is_
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from emerging_optimizers.mixin import WeightDecayMixin
from emerging_optimizers.soap.checkpoint import load_exactly, with_plain_options
from emerging_optimizers.soap.due import STAGGER_PROCESSES, Schedule
from emerging_optimizers.soap.functional import (
    init_kronecker_factors,
    precondition,
    update_eigenbasis_and_momentum,
    update_kronecker_factors,
    update_kronecker_factors_kl_shampoo,
)
from emerging_optimizers.soap.incidents import count_skips
from emerging_optimizers.soap.options import (
    OPTIONS,
    check_params,
    name_of,
    validate_options,
    warn_of_flat_parameters,
    warn_of_misspelt_options,
)
from emerging_optimizers.soap.precision import fp32_matmul_precision, without_autocast
from emerging_optimizers.soap.stacks import Run, StackedState, first_unusable_gradient, stacks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from emerging_optimizers.soap.distributed.driver import SharedParameters

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

    One step for a matrix :math:`W` with gradient :math:`G`, in this order (algorithm 3 of arXiv 2409.11321, but that
    factors and bases come first, and that :math:`M` is kept in the bases):

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
            list and the number of processes that share it, which the group keeps under "stagger_processes".
        pack_factors: Keep each symmetric Kronecker factor as one triangle, and expand it while it is worked on: half of
            the factors' memory for a copy out and in again per step. Cannot change after the first step.
        state_dtype: In which the first moment and the eigenbases are kept: ``torch.bfloat16`` halves their memory,
            None is the working dtype, and ``torch.float32`` is for float64 parameters. The arithmetic stays in the
            working dtype; what is kept is rounded once per step. A bfloat16 first moment stands still where a step
            would change it by less than 0.4%, so ``betas[0]`` must stay well below 0.996; the tolerance of the adaptive
            criterion should be at least the rounding of a basis, 1e-3.
        process_group: The processes that hold every plain tensor among the parameters, with the same gradients, as DDP
            leaves them: a process group or a mesh of one dimension. Each matrix is then worked on, and its state kept,
            by one of them, which sends the others its new weights. DTensors (FSDP2, HSDP, tensor parallelism) bring
            their mesh along and need no argument. Not an option of a group, and not saved. With several processes the
            constructor, ``add_param_group``, ``step``, ``state_dict`` and ``load_state_dict`` must be called by all.

    State, per parameter: ``step``, ``exp_avg``, ``exp_avg_sq`` (in the eigenbasis once there is one) and
    ``skipped_steps``; with preconditioned axes also ``refresh_step`` (the value of ``step`` after the last refresh),
    ``failed_refreshes``, and per axis of the working shape ``GG_k`` and ``Q_k``. They are views into stacks that
    parameters share: clone them before saving the state of a single one. Where another process works on a parameter,
    all but ``step`` are empty; ``state_dict`` has them whole. The page on checkpointing says what each holds.

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
    #: Per group, the last step's stacks. Nothing but a cache: they are made from the state.
    _stacks: list[list[StackedState]] = []
    #: The options of all groups that were last found valid.
    _valid_options: list[Any] = []
    #: Steps the parameters that several processes hold; None where there are none.
    _shared: SharedParameters | None = None
    #: Whether the constructor is done, which compares its groups with other processes' all at once.
    _constructed = False

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
        process_group: ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        given = locals()
        defaults = {name: given[name] for name in OPTIONS}
        check_params(params)
        validate_options(defaults)
        if process_group is not None:
            self._share(process_group)
        super().__init__(params, defaults)
        if self._shared is not None:
            self._shared.check_parameters(self.param_groups)
        self._constructed = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, with this optimizer's defaults for the options that it does not set."""
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            validate_options({**self.defaults, **param_group})
            warn_of_misspelt_options(param_group, self.defaults)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        warn_of_flat_parameters(group)
        if self._shared is None and any(hasattr(parameter, "device_mesh") for parameter in group["params"]):
            self._share(None)
        if self._constructed and self._shared is not None:
            self._shared.check_parameters(self.param_groups)

    def _share(self, process_group: object) -> None:
        from emerging_optimizers.soap.distributed.driver import SharedParameters

        self._shared = SharedParameters(process_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shared": self._shared, "_constructed": True}

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, for ``torch.save`` and ``torch.load(weights_only=True)``.

        A ``precondition_frequency`` that is a callable is not part of it. Where several processes hold a parameter,
        the tensors are DTensors, and every process must call this.
        """
        self._place()
        if self._shared is None:
            return with_plain_options(super().state_dict())
        handle = self.register_state_dict_post_hook(self._shared.state_dict_hook, prepend=True)  # before the user's
        try:
            return with_plain_options(super().state_dict())
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a copy of a state, each tensor in the dtype that it has here, whatever the parameter's.

        The saved options replace the optimizer's own, but for a ``precondition_frequency`` that is or was a callable:
        there the optimizer's own is kept, with a warning if only one of the two is a callable. A state without
        entries, or from before an option existed, is accepted; the optimizer's own value of the option then stands.

        Raises:
            TypeError, ValueError: Types, groups, options, keys or shapes do not fit. Nothing has changed then.
        """
        load_exactly(self, super().load_state_dict, state_dict, self._shared)
        self._stacks = []  # or the old state would live on beside the new one until the next step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Does one optimization step, and returns what the closure returned, which is called once.

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
        self._validate_options()
        self._place()
        self._check_gradients()
        if self._shared is not None:
            self._shared.step(self.param_groups, self.state)
            return loss
        former, self._stacks = self._stacks, []
        runs: list[Run] = []
        for number, group in enumerate(self.param_groups):
            stacks = stacks_of(group, self.state, former[number] if number < len(former) else [])
            self._stacks.append(stacks)
            schedule = Schedule(group)
            for stack in stacks:
                runs += stack.runs([member.parameter.grad for member in stack.members], group, schedule)
        skipped: list[Tensor] = []
        for run in runs:
            with fp32_matmul_precision(run.group["fp32_matmul_prec"]), without_autocast(run.stacked.kind.device.type):
                grads = [grad for member in run.members if (grad := member.parameter.grad) is not None]
                run.move(*run.update(grads, skipped))
        if skipped:
            count_skips(skipped)
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

    def _validate_options(self) -> None:
        """Looks at the options of every group in which a scheduler or a user may have changed one."""
        options = [
            group[name] for group in self.param_groups for name in (*OPTIONS, STAGGER_PROCESSES) if name in group
        ]
        same = len(options) == len(self._valid_options) and all(map(is_, options, self._valid_options))
        for group in self.param_groups:
            if not same or isinstance(group["lr"], Tensor) or isinstance(group["betas"], list):  # may change in place
                validate_options(group)
        self._valid_options = options

    def _check_gradients(self) -> None:
        """Raises what a step could raise about a gradient, before it changes anything."""
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                grad = parameter.grad
                if grad is not None and (grad.layout != torch.strided or grad.is_complex()):
                    kind = "complex" if grad.is_complex() else "sparse"
                    raise RuntimeError(f"SOAP does not support {kind} gradients, got one for {name_of(group, index)}")
        if self._shared is not None:
            self._shared.check_gradients(self.param_groups)
        for group in self.param_groups:
            if group["nonfinite"] == "raise":
                find = first_unusable_gradient if self._shared is None else self._shared.first_unusable_gradient
                unusable = find(group)
                if unusable is not None:
                    raise RuntimeError(
                        f"The gradient of {name_of(group, unusable)} has NaN or Inf entries, or overflows"
                    )

    def _place(self) -> None:
        """Says which process works on which parameter, and for how many the places of staggered refreshes are made."""
        if self._shared is not None:
            self._shared.place(self.param_groups)
        for group in self.param_groups:
            if group["stagger_updates"] is True and STAGGER_PROCESSES not in group:
                group[STAGGER_PROCESSES] = 1 if self._shared is None else self._shared.workers(group)
