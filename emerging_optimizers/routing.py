"""Which of a model's parameters SOAP preconditions and which get plain AdamW, and why.

Matrices that transform features have structure that an eigenbasis can use. Embeddings and output heads have one very
long axis, whose factor would cost most and, for rare tokens, sees almost no gradient; vectors have no second axis. SOAP
runs AdamW for a group with ``max_precond_dim=0``, so one optimizer serves both kinds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from torch import Tensor, nn


class Route(NamedTuple):
    """Where one parameter goes, "soap", "adamw" or "frozen" (in no group), and why, in a few words."""

    name: str
    shape: tuple[int, ...]
    numel: int
    optimizer: str
    reason: str


class Routing:
    """The result of :func:`route_parameters`; prints as a table.

    Attributes:
        routes: One :class:`Route` per parameter of the model, in the model's order.
        soap: ``(name, parameter)`` pairs to precondition.
        adamw: ``(name, parameter)`` pairs for plain AdamW.
    """

    def __init__(self, routes: list[Route], parameters: dict[str, nn.Parameter]) -> None:
        self.routes = tuple(routes)
        self._route_of: dict[Tensor, Route] = {parameters[r.name]: r for r in routes}
        self.soap = [(r.name, parameters[r.name]) for r in routes if r.optimizer == "soap"]
        self.adamw = [(r.name, parameters[r.name]) for r in routes if r.optimizer == "adamw"]

    def param_groups(
        self, soap: dict[str, Any] | None = None, adamw: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups for SOAP, with names and these options; a kind without parameters makes no group."""
        return _two_groups(soap or {}, self.soap, adamw or {}, self.adamw)

    def split(self, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Divides parameter groups that somebody else made into groups for SOAP, with names.

        Frameworks make groups by weight decay, or by the depth of a layer. Each comes out as up to two, its
        preconditioned parameters and AdamW's, with its options. Frozen parameters are left out.

        Raises:
            ValueError: A group has a parameter that the model does not have.

        Example:
            >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
            >>> decayed, rest = [model[0].weight, model[1].weight], [model[1].bias]
            >>> groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            >>> for group in route_parameters(model).split(groups):
            ...     print([name for name, _ in group.pop("params")], group)
            ['1.weight'] {'weight_decay': 0.1}
            ['0.weight'] {'weight_decay': 0.1, 'max_precond_dim': 0}
            ['1.bias'] {'weight_decay': 0.0, 'max_precond_dim': 0}
        """
        split: list[dict[str, Any]] = []
        for index, group in enumerate(groups):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            parts: dict[str, list[tuple[str, Tensor]]] = {"soap": [], "adamw": [], "frozen": []}
            given = group["params"]
            for item in [given] if isinstance(given, Tensor) else given:
                parameter = item if isinstance(item, Tensor) else item[1]
                if parameter not in self._route_of:
                    raise ValueError(
                        f"parameter group {index} has a parameter of shape {tuple(parameter.shape)} that is not the "
                        "routed model's"
                    )
                route = self._route_of[parameter]
                parts[route.optimizer].append((route.name, parameter))
            split += _two_groups(options, parts["soap"], options, parts["adamw"])
        return split

    def __str__(self) -> str:
        """A table with one line per parameter, and totals."""
        width = max([len(r.name) for r in self.routes], default=0)
        lines = [
            f"{r.name:<{width}}  {'x'.join(map(str, r.shape)) or 'scalar':>14}  {r.optimizer:<6}  {r.reason}"
            for r in self.routes
        ]
        for optimizer in ("soap", "adamw", "frozen"):
            chosen = [r for r in self.routes if r.optimizer == optimizer]
            if chosen:
                lines.append(f"{optimizer}: {len(chosen)} tensors, {sum(r.numel for r in chosen):,} parameters")
        return "\n".join(lines)


def _two_groups(
    soap: Mapping[str, Any], preconditioned: Any, adamw: Mapping[str, Any], rest: Any
) -> list[dict[str, Any]]:
    groups = [{**soap, "params": preconditioned}, {**adamw, "params": rest, "max_precond_dim": 0}]
    return [group for group in groups if group["params"]]


def route_parameters(
    model: nn.Module, *, adamw: Collection[str] = (), soap: Collection[str] = (), head: str | None = "last"
) -> Routing:
    """Decides for every parameter of a model whether SOAP preconditions it.

    AdamW gets embeddings (``nn.Embedding``, ``nn.EmbeddingBag``, and any layer that shares their weight), the output
    head, and tensors with fewer than two axes longer than one. Everything else is preconditioned. A parameter that
    several modules share is routed once.

    Args:
        model: The model.
        adamw: Names of parameters or modules that go to AdamW whatever the rules say.
        soap: Names of parameters or modules that are preconditioned whatever the rules say.
        head: Name of the output head's module, whose parameters go to AdamW; "last" takes the ``nn.Linear`` that was
            registered last, if there are several; None: the model has no head.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: A name is not one of the model's, or is asked for in both ways.

    Example:
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 50))
        >>> routing = route_parameters(model)
        >>> print(routing)
        0.weight            50x8  adamw   embedding
        1.weight             8x8  soap    matrix
        1.bias                 8  adamw   fewer than 2 axes
        2.weight               8  adamw   fewer than 2 axes
        2.bias                 8  adamw   fewer than 2 axes
        3.weight            50x8  adamw   output head
        3.bias                50  adamw   fewer than 2 axes
        soap: 1 tensors, 64 parameters
        adamw: 6 tensors, 874 parameters
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    parameters = dict(model.named_parameters())
    modules = {name for name, _ in model.named_modules()}
    for argument, names in {"adamw": adamw, "soap": soap, "head": [] if head in (None, "last") else [head]}.items():
        for name in [names] if isinstance(names, str) else names:
            if name not in modules and name not in dict(model.named_parameters(remove_duplicate=False)):
                raise ValueError(f"{argument} names {name!r}, which is neither a parameter nor a module of the model")

    asked_adamw = set(_tensors_of(model, adamw))
    asked_soap = set(_tensors_of(model, soap))
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) for p in m.parameters()}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if head == "last":
        head = linears[-1] if len(linears) > 1 else None
    heads = set() if head is None else set(_tensors_of(model, [head]))

    routes = []
    for name, parameter in parameters.items():
        if parameter in asked_adamw and parameter in asked_soap:
            raise ValueError(f"{name!r} is asked for in adamw and in soap; name it once")
        optimizer, reason = _treatment(
            parameter.shape,
            frozen=not parameter.requires_grad,
            asked="adamw" if parameter in asked_adamw else "soap" if parameter in asked_soap else None,
            embedding=parameter in embeddings,
            head=parameter in heads,
        )
        routes.append(Route(name, tuple(parameter.shape), parameter.numel(), optimizer, reason))
    return Routing(routes, parameters)


def route_shapes(
    shapes: Mapping[str, Sequence[int]], *, embeddings: Collection[str] = (), heads: Collection[str] = ()
) -> tuple[Route, ...]:
    """Decides as :func:`route_parameters` does, for a model of which only the shapes are known.

    ``embeddings`` and ``heads`` name the parameters of embeddings and output heads. All parameters are trained.

    Raises:
        ValueError: A name is not one of ``shapes``.

    Example:
        >>> for route in route_shapes({"wte": (50, 8), "up": (32, 8)}, embeddings=["wte"]):
        ...     print(route.name, route.optimizer, route.reason)
        wte adamw embedding
        up soap matrix
    """
    for argument, names in {"embeddings": embeddings, "heads": heads}.items():
        for name in names:
            if name not in shapes:
                raise ValueError(f"{argument} names {name!r}, which is none of the shapes")
    return tuple(
        Route(name, tuple(shape), prod(shape), *_treatment(shape, embedding=name in embeddings, head=name in heads))
        for name, shape in shapes.items()
    )


def _treatment(
    shape: Sequence[int], *, frozen: bool = False, asked: str | None = None, embedding: bool, head: bool
) -> tuple[str, str]:
    """The optimizer of a parameter, and why."""
    if frozen:
        return "frozen", "requires_grad is off"
    if asked is not None:
        return asked, "as asked"
    if embedding:
        return "adamw", "embedding"
    if sum(size > 1 for size in shape) < 2:
        return "adamw", "fewer than 2 axes"
    if head:
        return "adamw", "output head"
    return "soap", "matrix" if len(shape) == 2 else f"{len(shape)} axes"


def _tensors_of(model: nn.Module, names: Collection[str]) -> Iterator[Tensor]:
    """The parameters with these names, or inside the modules with these names."""
    wanted = {names} if isinstance(names, str) else set(names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if any(name == w or name.startswith(f"{w}.") or w == "" for w in wanted):
            yield parameter
