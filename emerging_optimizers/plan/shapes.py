"""A model as the planner sees it: the shape, the dtype and the route of every parameter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from emerging_optimizers.routing import Route, route_parameters, route_shapes

#: What the layers are called in the models that people save. Only their names are left in a file.
EMBEDDING = re.compile(r"(^|\.)(wte|wpe|tok_embeddings|embed_tokens|\w*embeddings?|embed_in)\.weight$")
HEAD = re.compile(r"^(model\.)?(lm_head|output|head|heads\.head|classifier|score|embed_out)\.(weight|bias)$")
BY_NAME = "embeddings and output head told by their names"


class Model(NamedTuple):
    """Route and dtype of each parameter of a model, in its order; and in ``note``, in words, what was assumed."""

    name: str
    routes: tuple[Route, ...]
    dtypes: tuple[torch.dtype, ...]
    note: str = ""


def model_of(
    source: Model | nn.Module | Mapping[str, Sequence[int]],
    *,
    name: str = "model",
    parameter_dtype: torch.dtype | None = None,
) -> Model:
    """Describes a model.

    Args:
        source: A module, on any device, also "meta"; or names and shapes, by whose names embeddings and heads are told;
            or a description, which is returned.
        name: What to call it.
        parameter_dtype: The dtype of all parameters; None: their own, and float32 for shapes.

    Raises:
        TypeError: ``source`` is something else, or ``parameter_dtype`` is no floating-point dtype.
        ValueError: A shape has a negative size.

    Example:
        >>> model_of(nn.Linear(4, 3)).routes[0]
        Route(name='weight', shape=(3, 4), numel=12, optimizer='soap', reason='matrix')
    """
    given: object = parameter_dtype  # a caller may pass anything
    if given is not None and not (isinstance(given, torch.dtype) and given.is_floating_point):
        raise TypeError(f"parameter_dtype must be a floating-point torch.dtype or None, got {parameter_dtype!r}")
    if isinstance(source, Model):
        found = source
    elif isinstance(source, nn.Module):
        parameters = dict(source.named_parameters())
        routes = route_parameters(source).routes
        found = Model(name, routes, tuple(parameters[route.name].dtype for route in routes))
    elif isinstance(source, Mapping):
        shapes = {key: _shape(key, shape) for key, shape in source.items()}
        embeddings = [key for key, shape in shapes.items() if len(shape) == 2 and EMBEDDING.search(key)]
        heads = [key for key in shapes if HEAD.search(key)]
        routes = route_shapes(shapes, embeddings=embeddings, heads=heads)
        found = Model(name, routes, (torch.float32,) * len(routes), BY_NAME if embeddings or heads else "")
    else:
        raise TypeError(f"model must be a module, a mapping of names to shapes or a Model, got {type(source).__name__}")
    return found if parameter_dtype is None else found._replace(dtypes=(parameter_dtype,) * len(found.routes))


def _shape(name: str, shape: Iterable[object]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if isinstance(size, int) and size >= 0)
    if len(sizes) != len(tuple(shape)):
        raise ValueError(f"the shape of {name!r} must be integers >= 0, got {shape!r}")
    return sizes
