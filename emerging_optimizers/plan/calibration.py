"""From FLOPs to milliseconds on this machine: rates of products and of QR by size, and what a step costs besides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from emerging_optimizers.plan.costs import Work, refresh_work, step_work
from emerging_optimizers.plan.planning import Plan, Row
from emerging_optimizers.soap import SOAP
from emerging_optimizers.soap.precision import fp32_matmul_precision
from emerging_optimizers.soap.state import Layout

SIZES = (32, 64, 128, 256, 512, 1024)
#: A stack of this many elements is measured, or one matrix: SOAP batches matrices of one shape.
STACK_ELEMENTS = 2**20
SMALL = 64  # the size at which what is not a product weighs most


@dataclass(frozen=True)
class Rates:
    """What was measured here, in float32.

    Attributes:
        device: Where.
        threads: torch's threads, for a CPU.
        product_rates: FLOPs per second of products of stacked d x d matrices, by d.
        qr_rates: FLOPs per second of their QR, which counts as 4 d^3, by d.
        adam_seconds: Per element of a tensor that is not preconditioned.
        element_seconds: Per element of a preconditioned tensor and of its factors, besides the products of a step.
        refresh_element_seconds: The same, besides products and QR of a refresh.
        step_seconds: Of any step, whatever its size.
    """

    device: str
    threads: int
    product_rates: Mapping[int, float]
    qr_rates: Mapping[int, float]
    adam_seconds: float
    element_seconds: float
    refresh_element_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Prediction:
    """Seconds of SOAP on one rank: a step without a refresh, a refresh of all eigenbases on top, and the mean step."""

    step: float
    refresh: float
    mean: float


def calibrate(seconds: float = 10.0, device: str | torch.device = "cpu") -> Rates:
    """Measures rates on this machine, for about so many seconds.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    where = torch.device(device)
    slot = seconds / (2 * len(SIZES) + 6)  # a SOAP step takes two
    generator = torch.Generator().manual_seed(0)
    matmul, qr = {}, {}
    for size in SIZES:
        count = max(1, STACK_ELEMENTS // size**2)
        stack = torch.randn(count, size, size, generator=generator).to(where)
        out = torch.empty_like(stack)
        with fp32_matmul_precision("high"):
            taken = _time(lambda a=stack, b=out: torch.matmul(a, a, out=b), slot, where)  # type: ignore[misc]
        matmul[size] = 2 * size**3 * count / taken
        taken = _time(lambda a=stack: torch.linalg.householder_product(*torch.geqrf(a)), slot, where)  # type: ignore[misc]
        qr[size] = 4 * size**3 * count / taken
    few = _soap_step([(1,)], slot, where)
    vector = _soap_step([(2**20,)], slot, where)
    rates = Rates(str(where), torch.get_num_threads(), matmul, qr, max(0.0, vector - few) / 2**20, 0.0, 0.0, few)
    square, count = Layout((SMALL, SMALL), (0, 1)), STACK_ELEMENTS // SMALL**2
    plain, refreshing = (
        _soap_step([square.shape] * count, 2 * slot, where, precondition_frequency=every) for every in (10**9, 1)
    )
    products = count * _seconds(step_work(square), rates)
    refresh = count * sum(_seconds(refresh_work(square, axis), rates) for axis in square.axes)
    touched = 3 * count * SMALL**2
    return replace(
        rates,
        element_seconds=max(0.0, plain - few - products) / touched,
        refresh_element_seconds=max(0.0, refreshing - plain - refresh) / touched,
    )


def predict(planned: Plan, rates: Rates) -> Prediction:
    """Predicts the time of SOAP's step by the rates of this machine, for float32 at the default precision.

    Raises:
        ValueError: The plan has several ranks, whose transfers were not measured.
    """
    if planned.ranks != 1:
        raise ValueError(f"a prediction needs a plan for 1 rank, got {planned.ranks}")
    step, refresh = rates.step_seconds, 0.0
    for row in planned.rows:
        if row.layout.axes:
            step += _seconds(step_work(row.layout), rates) + _touched(row) * rates.element_seconds
            refresh += sum(_seconds(refresh_work(row.layout, axis), rates) for axis in row.layout.axes)
            refresh += _touched(row) * rates.refresh_element_seconds
        elif row.optimizer != "frozen":
            step += row.numel * rates.adam_seconds
    return Prediction(step, refresh, step + refresh / planned.frequency)


def _touched(row: Row) -> int:
    """Elements of the tensor and of its factors."""
    return row.numel + sum(row.layout.shape[axis] ** 2 for axis in row.layout.axes)


def _seconds(work: Iterable[Work], rates: Rates) -> float:
    return sum(
        part.flops / _rate(rates.qr_rates if part.kind == "decompositions" else rates.product_rates, part.size)
        for part in work
    )


def _rate(rates: Mapping[int, float], size: int) -> float:
    """The rate at a size: that of the nearest that was measured, or on the straight line between two."""
    smaller = max((s for s in rates if s <= size), default=min(rates))
    larger = min((s for s in rates if s >= size), default=max(rates))
    if smaller >= larger:
        return rates[larger if smaller > size else smaller]
    weight = (size - smaller) / (larger - smaller)
    return (1 - weight) * rates[smaller] + weight * rates[larger]


def _soap_step(shapes: list[tuple[int, ...]], seconds: float, device: torch.device, **options: Any) -> float:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
    optimizer = SOAP(parameters, lr=1e-6, **options)
    return _time(optimizer.step, seconds, device)


def _time(work: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """The median time of a call, after two that are not counted; at least three are."""
    times: list[float] = []
    for _ in range(2):
        work()
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
