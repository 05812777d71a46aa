"""From measurements to words: what is wrong with a tensor's state, and what to try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from emerging_optimizers.health.results import FactorHealth, TensorHealth

#: The severity of what has no measure, and the largest.
FAR_BEYOND = 1e6
#: Before so many steps a zero gradient or a large update may be the start: behind a zero-initialised layer the first
#: gradients are zero, and a zero-initialised weight is for n steps only n updates large.
YOUNG_STEPS = 20
#: Before so many steps a stale basis may be that of a single gradient.
SETTLED_STEPS = 100
FEWEST_SKIPPED = 3
#: The largest ``max |Q^T Q - I|`` by the dtype of the bases.
ORTHOGONALITY = {"float32": 1e-4, "bfloat16": 0.02, "float64": 1e-11}
#: Of weights that have 16 bits. In float32 an update gets lost when a schedule ends at 0, and that does no harm.
MACHINE_EPSILON = {"bfloat16": torch.finfo(torch.bfloat16).eps, "float16": torch.finfo(torch.float16).eps}


class Rule(NamedTuple):
    """One kind of finding: its threshold, as a number (0 where none is needed) and in words, and what that rests on."""

    limit: float
    threshold: str
    basis: str
    what: str
    advice: str


#: By kind. The races are those of ``docs/health.md``.
RULES = {
    "stale basis": Rule(
        0.7,
        f"residual above {{limit:g}}, from step {SETTLED_STEPS} on",
        "Above what healthy races reach just before a refresh; the first bases are of few gradients",
        "axis {f.axis}: {f.residual:.0%} of the factor's norm is off the diagonal, {t.age} steps after the last "
        "refresh.",
        "Refresh more often: lower precondition_frequency{now}{adaptive}; or raise shampoo_beta or the batch size, so "
        "that the factor turns more slowly.",
    ),
    "basis not orthogonal": Rule(
        0.0,
        ", ".join(f"{limit:g} in {dtype}" for dtype, limit in ORTHOGONALITY.items()),
        "Well above the rounding of each dtype",
        "axis {f.axis}: max |Q^T Q - I| is {f.orthogonality:.1e}, and at most {limit:.0e} should come from "
        "{f.basis_dtype} bases.",
        "The state was changed or damaged: load an earlier checkpoint. If it happened in training, set use_eigh=True "
        "and report it.",
    ),
    "dead gradient": Rule(
        0.0,
        f"the second moment is zero everywhere, from step {YOUNG_STEPS} on",
        "Behind a zero-initialised layer the first gradients are zero",
        "every gradient of {t.usable_steps} steps was zero: nothing is learnt here.",
        "Look for a detached or unused branch, a dead activation or a zero-initialised layer in front of it; set "
        "requires_grad=False if that is meant.",
    ),
    "gradient stopped": Rule(
        1e-5,
        "update of a matrix below {limit:g} learning rates",
        "Vectors are not asked: the bias of attention keys has no gradient but rounding",
        "the update is {t.direction_rms:.1e} of a learning rate: the gradient has been zero lately, or is below eps.",
        "Look for a branch that is no longer used; if gradients are this small by nature, scale the loss up or lower "
        "eps.",
    ),
    "skipped steps": Rule(
        0.01,
        f"{FEWEST_SKIPPED}, and more than {{limit:.0%}}",
        "A cause that lasts",
        "{t.skipped_steps} of {t.step} gradients had NaN or Inf or overflowed, and were not used.",
        "Lower the learning rate, clip gradients, or look for a log or a division near 0 in the loss; with float16 use "
        "a GradScaler.",
    ),
    "failed refreshes": Rule(
        0.0,
        "1",
        "Each was retried alone, in float64 and on the CPU",
        "{t.failed_refreshes} times a decomposition failed in every way, and the last good basis stayed.",
        "Look for gradients many orders of magnitude apart and clip them; the log has the first error.",
    ),
    "refresh overdue": Rule(
        2.0,
        "{limit:g} periods",
        "Refreshes met skipped gradients, or the state is not of these options",
        "the last refresh was {t.age} steps ago, and one is due every {t.frequency}.",
        "Every gradient at a refresh was skipped (see skipped steps), or the saved state is not of these options.",
    ),
    "update too large": Rule(
        1.0,
        f"a step as large as the weight, from step {YOUNG_STEPS} on",
        "Such a step replaces the weight",
        "one step changes the weight by {t.update_ratio:.1f} times its own root mean square.",
        "Lower the learning rate, warm it up, or set max_update_rms.",
    ),
    "update lost in rounding": Rule(
        1 / 16,
        "{limit:g} of the machine epsilon, of 16-bit weights",
        "Most weights do not move at all",
        "one step changes the weight by {t.update_ratio:.1e} of its size, and {t.weight_dtype} resolves {limit:.1e}: "
        "most weights do not move.",
        "Keep the weights in float32 (autocast for the products), or raise the learning rate.",
    ),
    "second moment too small": Rule(
        10.0,
        "update above {limit:g} learning rates",
        "Above Adam's own bound at the usual betas",
        "the update is {t.direction_rms:.1e} learning rates per weight, more than Adam can give.",
        "The second moment was changed or damaged: load an earlier checkpoint, or lower the learning rate for a few "
        "hundred steps.",
    ),
    "state not finite": Rule(
        0.0,
        "any NaN or Inf",
        "",
        "NaN or Inf in the moments, factors or bases.",
        'Go back to an earlier checkpoint. Leave nonfinite="skip" on; if it was on, the file or the memory is bad.',
    ),
}


def threshold_rows() -> list[tuple[str, str, str]]:
    """The rows of the table in ``docs/health.md``: a finding, its threshold, and what that rests on."""
    return [(kind.capitalize(), rule.threshold.format(limit=rule.limit), rule.basis) for kind, rule in RULES.items()]


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with one tensor: of which kind, as "stale basis", what, with the figure, and what to try.

    ``severity`` says how far it is beyond its threshold, from 1 to 1e6.
    """

    kind: str
    name: str
    what: str
    advice: str
    severity: float

    def __str__(self) -> str:
        return f"{self.name}: {self.kind}: {self.what} {self.advice}"


def _finding(
    tensor: TensorHealth, kind: str, severity: float = FAR_BEYOND, factor: FactorHealth | None = None, limit: float = 0
) -> Finding:
    now = "" if tensor.frequency is None else f" (now {tensor.frequency})"
    adaptive = " or adaptive_update_tolerance" if tensor.adaptive else ""
    what = RULES[kind].what.format(t=tensor, f=factor, limit=limit)
    advice = RULES[kind].advice.format(now=now, adaptive=adaptive)
    return Finding(kind, tensor.name, what, advice, min(severity, FAR_BEYOND))


def diagnose(tensor: TensorHealth) -> Iterator[Finding]:
    """What is wrong with a tensor, if anything."""
    if not tensor.finite:
        yield _finding(tensor, "state not finite")
        return
    if tensor.skipped_steps >= FEWEST_SKIPPED:
        skipped = _excess(tensor.skipped_steps / tensor.step, "skipped steps")
        if skipped > 1:
            yield _finding(tensor, "skipped steps", skipped)
    if tensor.dead:
        if tensor.usable_steps >= YOUNG_STEPS:
            yield _finding(tensor, "dead gradient")
        return
    for factor in tensor.factors:
        limit, stale = ORTHOGONALITY[factor.basis_dtype], _excess(factor.residual, "stale basis")
        if factor.orthogonality is not None and factor.orthogonality > limit:
            yield _finding(tensor, "basis not orthogonal", factor.orthogonality / limit, factor, limit)
        elif tensor.usable_steps >= SETTLED_STEPS and stale > 1:
            yield _finding(tensor, "stale basis", stale, factor)
    if (overdue := _excess(tensor.periods, "refresh overdue")) > 1:
        yield _finding(tensor, "refresh overdue", overdue)
    if tensor.failed_refreshes > 0:
        yield _finding(tensor, "failed refreshes", 1.0 + tensor.failed_refreshes)
    if tensor.usable_steps >= YOUNG_STEPS and tensor.direction_rms is not None:
        yield from _diagnose_update(tensor, tensor.direction_rms)


def _diagnose_update(tensor: TensorHealth, direction: float) -> Iterator[Finding]:
    ratio, matrix = tensor.update_ratio, len(tensor.shape) > 1
    if matrix and direction < (least := RULES["gradient stopped"].limit):
        yield _finding(tensor, "gradient stopped", least / max(direction, 1e-30))
    elif (excess := _excess(direction, "second moment too small")) > 1:
        yield _finding(tensor, "second moment too small", excess)
    elif matrix and (excess := _excess(ratio, "update too large")) > 1:
        yield _finding(tensor, "update too large", excess)
    elif ratio is not None and tensor.weight_dtype in MACHINE_EPSILON and tensor.learning_rate > 0:
        epsilon = MACHINE_EPSILON[tensor.weight_dtype]
        if ratio < (least := RULES["update lost in rounding"].limit * epsilon):
            yield _finding(tensor, "update lost in rounding", least / max(ratio, 1e-30), limit=epsilon)


def _excess(value: float | None, kind: str) -> float:
    """A measurement over its threshold; 0 where there is none."""
    return (value or 0.0) / RULES[kind].limit


def concern(tensor: TensorHealth) -> float:
    """How near a tensor is to the nearest threshold, or how far beyond: above 1 where something is wrong."""
    if found := max((finding.severity for finding in diagnose(tensor)), default=0.0):
        return found
    near = [(f.orthogonality or 0.0) / ORTHOGONALITY[f.basis_dtype] for f in tensor.factors]
    stale = [min(_excess(f.residual, "stale basis"), 1.0) for f in tensor.factors]
    return max(near + stale, default=0.0)


@dataclass(frozen=True)
class Health:
    """What :func:`emerging_optimizers.health.examine` found.

    Attributes:
        tensors: The parameters that have a state here, in the optimizer's order.
        waiting: The names of those that have none yet: no gradient has come.
        elsewhere: The names of those that another process works on, which must be asked there.
        incidents: What was survived in this process so far, of every optimizer in it, by kind; empty for a saved state.
    """

    tensors: tuple[TensorHealth, ...]
    waiting: tuple[str, ...]
    elsewhere: tuple[str, ...]
    incidents: Mapping[str, int]

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """What is wrong and what to try, worst first; empty where nothing is."""
        found = (finding for tensor in self.tensors for finding in diagnose(tensor))
        return tuple(sorted(found, key=lambda finding: -finding.severity))

    @property
    def worst_first(self) -> list[TensorHealth]:
        """The tensors by how near they are to a threshold, or how far beyond."""
        return sorted(self.tensors, key=lambda tensor: -concern(tensor))

    @property
    def step(self) -> int:
        """The steps of the tensor that has done most."""
        return max((tensor.step for tensor in self.tensors), default=0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts, lists, numbers and texts, all finite, for JSON."""
        return {
            "step": self.step,
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": [asdict(tensor) | {"periods": tensor.periods} for tensor in self.tensors],
            "waiting": list(self.waiting),
            "elsewhere": list(self.elsewhere),
            "incidents": dict(self.incidents),
        }
