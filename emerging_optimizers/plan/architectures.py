"""The parameters of well-known architectures, written down as names and shapes.

Decoders are read from a Hugging Face ``config.json``, whose keys and parameter names they use; ``transformers`` is not
needed. The two vision models are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from emerging_optimizers.plan.shapes import Model
from emerging_optimizers.routing import route_shapes

#: What a damaged file may ask for is not built.
MOST_LAYERS, LARGEST_SIZE = 10_000, 2**31

Shapes = dict[str, tuple[int, ...]]

_LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
PRESET_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "n_embd": 768, "n_layer": 12},
    "gpt2-xl": {**_GPT2, "n_embd": 1600, "n_layer": 48},
    "llama-3-8b": {**_LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                   "num_attention_heads": 32},
    "llama-3-70b": {**_LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                    "num_attention_heads": 64},
}  # fmt: skip


def decoder(config: Mapping[str, Any], name: str) -> Model:
    """The model that a Hugging Face configuration describes.

    Args:
        config: What is in ``config.json``.
        name: What to call the model.

    Raises:
        ValueError: Its ``model_type`` is not known here, or a number is missing or impossible.

    Example:
        >>> sum(route.numel for route in decoder(PRESET_CONFIGS["gpt2"], "gpt2").routes)
        124439808
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DECODERS:
        raise ValueError(f"model_type must be one of {', '.join(_DECODERS)}, got {kind!r}")
    shapes, embeddings, head = _DECODERS[kind](config)
    routes = route_shapes(shapes, embeddings=embeddings, heads=[head] if head else [])
    return Model(name, routes, (_dtype(config),) * len(routes))


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype", config.get("torch_dtype"))
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    return dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32


def _number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    most = MOST_LAYERS if key in ("n_layer", "num_hidden_layers") else LARGEST_SIZE
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{key} must be an integer from 1 to {most:,}, got {value!r}")
    return value


def _gpt2(config: Mapping[str, Any]) -> tuple[Shapes, list[str], str | None]:
    width, vocabulary = _number(config, "n_embd"), _number(config, "vocab_size")
    inner = _number(config, "n_inner", 4 * width)
    shapes: Shapes = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (_number(config, "n_positions"), width),
    }
    for layer in range(_number(config, "n_layer")):
        block = f"transformer.h.{layer}"
        shapes.update(_norm(f"{block}.ln_1", width))
        # GPT-2's layers keep their weights as (in, out).
        for part, size in {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}.items():
            shapes |= {f"{block}.{part}.weight": size, f"{block}.{part}.bias": size[1:]}
        shapes.update(_norm(f"{block}.ln_2", width))
        for part, size in {"mlp.c_fc": (width, inner), "mlp.c_proj": (inner, width)}.items():
            shapes |= {f"{block}.{part}.weight": size, f"{block}.{part}.bias": size[1:]}
    shapes.update(_norm("transformer.ln_f", width))
    head = _head(config, shapes, vocabulary, width, tied=True)
    return shapes, ["transformer.wte.weight", "transformer.wpe.weight"], head


def _llama(config: Mapping[str, Any]) -> tuple[Shapes, list[str], str | None]:
    """Llama, Mistral and Qwen2: they differ in biases, and in what a key that is missing means."""
    qwen = config["model_type"] == "qwen2"
    width, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
    heads, inner = _number(config, "num_attention_heads"), _number(config, "intermediate_size")
    size = _number(config, "head_dim", width // heads)
    key_value = size * _number(config, "num_key_value_heads", 8 if config["model_type"] == "mistral" else heads)
    biased = qwen or bool(config.get("attention_bias"))
    attention = {"q": (heads * size, width), "k": (key_value, width), "v": (key_value, width),
                 "o": (width, heads * size)}  # fmt: skip
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(_number(config, "num_hidden_layers")):
        block = f"model.layers.{layer}"
        for part, shape in attention.items():
            shapes[f"{block}.self_attn.{part}_proj.weight"] = shape
            if biased and not (qwen and part == "o"):
                shapes[f"{block}.self_attn.{part}_proj.bias"] = shape[:1]
        for part, shape in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
            shapes[f"{block}.mlp.{part}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{block}.mlp.{part}_proj.bias"] = shape[:1]
        shapes[f"{block}.input_layernorm.weight"] = (width,)
        shapes[f"{block}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    return shapes, ["model.embed_tokens.weight"], _head(config, shapes, vocabulary, width, tied=False)


def _head(config: Mapping[str, Any], shapes: Shapes, vocabulary: int, width: int, tied: bool) -> str | None:
    """Adds the head, unless it shares the embedding's weight."""
    if config.get("tie_word_embeddings", tied):
        return None
    shapes["lm_head.weight"] = (vocabulary, width)
    return "lm_head.weight"


_DECODERS: dict[str, Callable[[Mapping[str, Any]], tuple[Shapes, list[str], str | None]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
}


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def resnet50() -> Model:
    """ResNet-50 as torchvision has it. Routing takes its classifier, the only linear layer, for no head."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **dict(_norm("bn1", 64))}
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            kernels = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for i, kernel in enumerate(kernels, start=1):
                shapes |= {f"{name}.conv{i}.weight": kernel, **dict(_norm(f"{name}.bn{i}", kernel[0]))}
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                shapes.update(_norm(f"{name}.downsample.1", 4 * width))
            channels = 4 * width
    shapes |= {"fc.weight": (1000, channels), "fc.bias": (1000,)}
    return _float32("resnet50", shapes, [])


def vit_b() -> Model:
    """ViT-B/16 as torchvision has it. Its position embedding is a plain parameter, which routing preconditions."""
    width, inner = 768, 3072
    shapes: Shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, 16, 16),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (1, 197, width),
    }
    for layer in range(12):
        block = f"encoder.layers.encoder_layer_{layer}"
        shapes.update(_norm(f"{block}.ln_1", width))
        shapes |= {
            f"{block}.self_attention.in_proj_weight": (3 * width, width),
            f"{block}.self_attention.in_proj_bias": (3 * width,),
            f"{block}.self_attention.out_proj.weight": (width, width),
            f"{block}.self_attention.out_proj.bias": (width,),
        }
        shapes.update(_norm(f"{block}.ln_2", width))
        shapes |= {f"{block}.mlp.0.weight": (inner, width), f"{block}.mlp.0.bias": (inner,)}
        shapes |= {f"{block}.mlp.3.weight": (width, inner), f"{block}.mlp.3.bias": (width,)}
    shapes.update(_norm("encoder.ln", width))
    shapes |= {"heads.head.weight": (1000, width), "heads.head.bias": (1000,)}
    return _float32("vit-b", shapes, ["heads.head.weight", "heads.head.bias"])


def _float32(name: str, shapes: Shapes, heads: list[str]) -> Model:
    routes = route_shapes(shapes, heads=heads)
    return Model(name, routes, (torch.float32,) * len(routes))
