"""What state a SOAP optimizer is in, from the outside: measured, put into words, and followed through a run.

Everything here only reads: no state is changed, no gradient touched. :func:`examine` measures a live optimizer or a
saved state dict once, :class:`HealthMonitor` does so every N steps of a run.

Example:
    >>> import torch
    >>> from emerging_optimizers.soap import SOAP
    >>> weight = torch.nn.Parameter(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
    >>> optimizer = SOAP([("weight", weight)], lr=0.1, precondition_frequency=10)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     weight.square().sum().backward()
    ...     optimizer.step()
    >>> health = examine(optimizer)
    >>> health.findings
    ()
    >>> [factor.size for factor in health.tensors[0].factors]
    [2, 2]
    >>> health.tensors[0].age
    9
"""

from emerging_optimizers.health.diagnosis import Finding, Health, concern
from emerging_optimizers.health.measure import examine
from emerging_optimizers.health.monitor import HealthMonitor
from emerging_optimizers.health.results import FactorHealth, TensorHealth

__all__ = ["FactorHealth", "Finding", "Health", "HealthMonitor", "TensorHealth", "concern", "examine"]
