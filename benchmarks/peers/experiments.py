"""Experiments that show how a SOAP behaves, from outside: weights, gradients and state around a step.

    python benchmarks/peers/experiments.py pytorch-optimizer

Prints one JSON object, an answer per experiment, for one of ``subjects.py``.
``behaviour.py`` runs it for all.
"""

import io
import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from subjects import (
    NAMES,
    SHAPE,
    NoSuchOption,
    Subject,
    as_adamw,
    bases,
    factor_sizes,
    gradient,
    steps,
    tensors,
    weight,
)
from torch import nn


def first_steps(subject: Subject) -> list[float]:
    """The root mean square of each of the first four updates, over the learning rate, without weight decay."""
    parameter = weight()
    path = [parameter.detach().clone()]
    path += steps(subject.make([parameter], weight_decay=0.0), parameter, 1, 4)
    return [round(((b - a).square().mean().sqrt() / 1e-2).item(), 3) for a, b in zip(path, path[1:], strict=False)]


def weight_decay(subject: Subject) -> list[str]:
    """How weight decay enters steps 1 to 3: beside a run without it, whose updates are the same if it is decoupled."""
    decayed, free = weight(), weight()
    rate, strength = 1e-2, 0.5
    runs = subject.make([decayed], lr=rate, weight_decay=strength), subject.make([free], lr=rate, weight_decay=0.0)
    answers = []
    for step in (1, 2, 3):
        before, free_before = decayed.detach().clone(), free.detach().clone()
        steps(runs[0], decayed, step, step)
        steps(runs[1], free, step, step)
        update = free_before - free.detach()
        candidates = {
            "none": before - update,
            "lr * weight_decay, of the weights before the update": before * (1 - rate * strength) - update,
            "lr * weight_decay, of the weights after the update": (before - update) * (1 - rate * strength),
            "weight_decay alone": before * (1 - strength) - update,
        }
        fits = [name for name, value in candidates.items() if torch.allclose(value, decayed.detach(), atol=2e-7)]
        answers.append(fits[0] if fits else "something else")
    return answers


def decay_methods(subject: Subject) -> str:
    """What the weights are multiplied by in a step at learning rate 0.01 and weight decay 0.5, as 1 minus a number."""
    answers = []
    for method in ("decoupled", "independent", "l2", "palm"):
        decayed, free = weight(), weight()
        try:
            runs = (
                subject.make([decayed], lr=1e-2, weight_decay=0.5, method=method),
                subject.make([free], lr=1e-2, weight_decay=0.0, method=method),
            )
        except (TypeError, ValueError):
            answers.append(f"{method} refused")
            continue
        start = decayed.detach().clone()
        update = start - steps(runs[1], free, 1, 1)[-1]
        factor = (start - update - steps(runs[0], decayed, 1, 1)[-1]) / start
        constant = (factor - factor.mean()).abs().max() < 0.01 * factor.mean().abs()
        answers.append(
            f"{method} {factor.mean().item():.2g}" if constant else f"{method} not a multiple of the weights"
        )
    return ", ".join(answers)


def refreshes(subject: Subject, **options: Any) -> str:
    """The steps after which a basis is another one, of 13."""
    parameter = weight()
    optimizer = subject.make([parameter], **options)
    changed, last = [], {}
    for step in range(1, 14):
        steps(optimizer, parameter, step, step)
        now = bases(optimizer)
        if now and (set(now) != set(last) or any((now[k] - last[k]).abs().max() > 1e-6 for k in now)):
            changed.append(step)
        last = now
    return f"after steps {changed}" if changed else "no basis seen in the state"


def refreshes_by_default(subject: Subject) -> str:
    """The same without setting a frequency."""
    return refreshes(subject)


def refreshes_at_4(subject: Subject) -> str:
    """The same with frequency 4."""
    return refreshes(subject, frequency=4)


def refresh_order(subject: Subject) -> str:
    """Whether a step that refreshes moves the weights with the new basis or the old one."""
    often, seldom = weight(), weight()
    runs = subject.make([often], frequency=4), subject.make([seldom], frequency=1000)
    basis_differs = 0
    for step in range(1, 14):
        steps(runs[0], often, step, step)
        steps(runs[1], seldom, step, step)
        one, other = bases(runs[0]), bases(runs[1])
        gaps = [(a - b).abs().max() for a, b in zip(one.values(), other.values(), strict=True)]
        if not basis_differs and any(gap > 1e-4 for gap in gaps):
            basis_differs = step
        if (often.detach() - seldom.detach()).abs().max() > 1e-5:
            if step == basis_differs:
                return f"refreshes, then moves the weights (step {step})"
            return f"moves the weights, then refreshes (basis differs after step {basis_differs}, weights after {step})"
    return "no difference seen"


def vector(subject: Subject) -> str:
    """A 1-D parameter of 5 entries."""
    return as_adamw(subject, (5,))


def vector_preconditioned(subject: Subject) -> str:
    """The same with precondition_1d."""
    return as_adamw(subject, (5,), one_d=True)


def scalar(subject: Subject) -> str:
    """A 0-D parameter."""
    return as_adamw(subject, ())


def row(subject: Subject) -> str:
    """A matrix of one row."""
    return as_adamw(subject, (1, 5))


def convolution(subject: Subject) -> str:
    """A 4-D parameter, (6, 4, 3, 3)."""
    return as_adamw(subject, (6, 4, 3, 3))


def convolution_merged(subject: Subject) -> str:
    """The same with merge_dims."""
    return as_adamw(subject, (6, 4, 3, 3), merge=True)


def empty(subject: Subject) -> str:
    """A parameter without elements, (0, 3)."""
    parameter = weight((0, 3))
    steps(subject.make([parameter]), parameter, 1, 3)
    return "steps"


def limit(subject: Subject) -> str:
    """An 8 x 4 matrix under a limit of 8, and of 7, on the preconditioned dimensions."""
    answers = []
    for value in (8, 7):
        parameter = weight((8, 4))
        optimizer = subject.make([parameter], limit=value)
        steps(optimizer, parameter, 1, 3)
        answers.append(f"limit {value}: bases of sizes {factor_sizes(optimizer)}")
    return "; ".join(answers)


def limit_zero(subject: Subject) -> str:
    """An 8 x 4 matrix under a limit of 0."""
    return as_adamw(subject, (8, 4), limit=0)


def bfloat16_state(subject: Subject) -> str:
    """The dtypes of the state of a bfloat16 matrix, and after it went through a state dict."""
    parameter = weight(dtype=torch.bfloat16)
    optimizer = subject.make([parameter])
    steps(optimizer, parameter, 1, 3)
    other = subject.make([weight(dtype=torch.bfloat16)])
    other.load_state_dict(optimizer.state_dict())

    def dtypes(o: torch.optim.Optimizer) -> str:
        return ", ".join(
            sorted({str(t.dtype)[6:] for _, t in tensors(dict(o.state)) if t.is_floating_point() and t.ndim})
        )

    return f"{dtypes(optimizer)}; after loading {dtypes(other)}"


def resume(subject: Subject, dtype: torch.dtype) -> str:
    whole, cut = weight(dtype=dtype), weight(dtype=dtype)
    steps(subject.make([whole]), whole, 1, 9)
    optimizer = subject.make([cut])
    steps(optimizer, cut, 1, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    remark = ""
    try:
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception:
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        remark = "; the file does not load with weights_only=True"
    other = subject.make([cut])
    other.load_state_dict(saved)
    steps(other, cut, 6, 9)
    difference = (whole.detach() - cut.detach()).abs().max().item()
    return ("bit for bit" if difference == 0 else f"weights differ by up to {difference:.1e}") + remark


def resume_float32(subject: Subject) -> str:
    """Nine steps of a float32 matrix, saved and loaded into a new optimizer after five, beside nine in one go."""
    return resume(subject, torch.float32)


def resume_bfloat16(subject: Subject) -> str:
    """The same with a bfloat16 matrix."""
    return resume(subject, torch.bfloat16)


def nan_gradient(subject: Subject) -> str:
    """A NaN in the gradient of one of two matrices at step 5, and five more steps."""
    spoiled, other = weight(), weight(seed=1)
    optimizer = subject.make([spoiled, other])
    for step in range(1, 11):
        spoiled.grad, other.grad = gradient(step), gradient(step)
        if step == 5:
            spoiled.grad[0, 0] = torch.nan
        optimizer.step()
    words = {True: "finite", False: "not finite"}
    return f"that one is {words[bool(spoiled.isfinite().all())]}, the other {words[bool(other.isfinite().all())]}"


def zero_gradients(subject: Subject) -> str:
    """Zero gradients in the first three steps, without weight decay, then others."""
    parameter = weight()
    start = parameter.detach().clone()
    optimizer = subject.make([parameter], weight_decay=0.0)
    for _ in range(3):
        parameter.grad = torch.zeros(SHAPE)
        optimizer.step()
    still = bool((parameter.detach() == start).all())
    path = steps(optimizer, parameter, 4, 8)
    sizes = max((b - a).abs().max().item() / 1e-2 for a, b in zip(path, path[1:], strict=False))
    moves = "no weight moves" if still else "the weights move"
    return f"{moves}; later updates of up to {sizes:.2g} times the learning rate"


def missing_gradients(subject: Subject) -> str:
    """Two matrices, of which the second has its first gradient in step 3."""
    first, second = weight(), weight(seed=1)
    start = second.detach().clone()
    optimizer = subject.make([first, second], weight_decay=0.1)
    for step in range(1, 3):
        first.grad = gradient(step)
        optimizer.step()
    left = bool((second.detach() == start).all())
    for step in range(3, 6):
        first.grad, second.grad = gradient(step), gradient(step)
        optimizer.step()
    alone = weight(seed=1)
    steps(subject.make([alone], weight_decay=0.1), alone, 3, 5)
    same = "as alone" if torch.allclose(alone, second, atol=1e-6) else "otherwise than alone"
    return f"{'left alone' if left else 'moved'} while it has none; then steps {same}"


def gradient_after(subject: Subject) -> str:
    """What `.grad` is after a step."""
    parameter = weight()
    optimizer = subject.make([parameter])
    answers = []
    for step in (1, 2):
        parameter.grad = gradient(step)
        optimizer.step()
        if parameter.grad is None:
            answers.append("None")
        else:
            answers.append("unchanged" if torch.equal(parameter.grad, gradient(step)) else "another tensor")
    return answers[-1] if answers[0] == answers[1] else ", then ".join(answers)


def sparse_gradient(subject: Subject) -> str:
    """The gradient of an nn.Embedding with sparse=True."""
    parameter = weight()
    optimizer = subject.make([parameter])
    parameter.grad = gradient(1).to_sparse()
    optimizer.step()
    return "accepted"


def tensor_rate(subject: Subject) -> str:
    """A learning rate that is a tensor, changed in place between steps."""
    parameter = weight()
    rate = torch.tensor(1e-2)
    optimizer = subject.make([parameter], lr=rate)
    before = steps(optimizer, parameter, 1, 3)[-1]
    rate.fill_(0.0)
    after = steps(optimizer, parameter, 4, 4)[-1]
    return "accepted, and read at every step" if torch.equal(before, after) else "accepted, read once"


def names(subject: Subject) -> str:
    """Parameters given as `model.named_parameters()`."""
    model = nn.Linear(4, 3)
    subject.make(model.named_parameters())
    return "accepted"


def unknown_option(subject: Subject) -> str:
    """An option that does not exist, `precondition_freq`."""
    subject.cls([weight()], lr=1e-2, precondition_freq=10)
    return "accepted"


def maximize(subject: Subject) -> str:
    """Whether `maximize=True` does what negated gradients do."""
    parameter, other = weight(), weight()
    path = steps(subject.make([parameter], weight_decay=0.0, maximize=True), parameter, 1, 3)
    optimizer = subject.make([other], weight_decay=0.0)
    for step in range(1, 4):
        other.grad = -gradient(step)
        optimizer.step()
    return "as the negated gradient" if torch.allclose(path[-1], other.detach(), atol=1e-6) else "otherwise"


def largest_update(subject: Subject) -> str:
    """The largest root mean square of an update over the learning rate, in 30 steps with a refresh in each.

    A 24 x 4 matrix, Gaussian gradients, no weight decay, six seeds.
    """
    options = {"frequency": 1} if "frequency" in NAMES[subject.name] else {}
    worst = 0.0
    for seed in range(6):
        parameter = nn.Parameter(torch.zeros(24, 4))
        optimizer = subject.make([parameter], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, **options)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(24, 4, generator=generator)
            optimizer.step()
            worst = max(worst, (parameter.detach() - before).square().mean().sqrt().item())
    return f"{worst:.3g}"


def state_bytes(subject: Subject) -> float:
    """Bytes of state per element of a 64 x 64 matrix, after three steps."""
    parameter = weight((64, 64))
    optimizer = subject.make([parameter])
    steps(optimizer, parameter, 1, 3)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in tensors(dict(optimizer.state))}
    return round(sum(storages.values()) / parameter.numel(), 1)


EXPERIMENTS: tuple[Callable[[Subject], Any], ...] = (
    first_steps, weight_decay, decay_methods, refreshes_by_default, refreshes_at_4, refresh_order, vector,
    vector_preconditioned, scalar, row, convolution, convolution_merged, empty, limit, limit_zero, bfloat16_state,
    resume_float32, resume_bfloat16, nan_gradient, zero_gradients, missing_gradients, gradient_after,
    sparse_gradient, tensor_rate, names, largest_update, unknown_option, maximize, state_bytes,
)  # fmt: skip


def answer(experiment: Callable[[Subject], Any], subject: Subject) -> Any:
    """What an experiment gives, in a JSON type; an error in its words."""
    try:
        return experiment(subject)
    except NoSuchOption:
        return "no such option"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    subject = Subject(sys.argv[1])
    print(json.dumps({experiment.__name__: answer(experiment, subject) for experiment in EXPERIMENTS}))


if __name__ == "__main__":
    main()
