"""The parameters of well-known architectures, written down as names and shapes.

Decoders are read from a Hugging Face ``config.json``, whose keys and parameter names they use; ``transformers`` is not
needed. The two vision models are torchvision's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    """The model that a Hugging Face ``config.json`` describes.

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
    embeddings = {
        "transformer.wte.weight": (vocabulary, width),
        "transformer.wpe.weight": (_number(config, "n_positions"), width),
    }
    # GPT-2's layers keep their weights as (in, out).
    block = {
        "ln_1.": (width,),
        "attn.c_attn.": (width, 3 * width),
        "attn.c_proj.": (width, width),
        "ln_2.": (width,),
        "mlp.c_fc.": (width, inner),
        "mlp.c_proj.": (inner, width),
    }
    shapes: Shapes = {**embeddings}
    for layer in range(_number(config, "n_layer")):
        shapes |= _with_biases(f"transformer.h.{layer}.", block, transposed=True)
    shapes |= _with_biases("transformer.ln_f.", {"": (width,)})
    return shapes, list(embeddings), _head(config, shapes, vocabulary, width, tied=True)


def _llama(config: Mapping[str, Any]) -> tuple[Shapes, list[str], str | None]:
    """Llama, Mistral and Qwen2: they differ in biases, and in what a key that is missing means."""
    qwen = config["model_type"] == "qwen2"
    width, vocabulary = _number(config, "hidden_size"), _number(config, "vocab_size")
    heads, inner = _number(config, "num_attention_heads"), _number(config, "intermediate_size")
    size = _number(config, "head_dim", width // heads)
    key_value = size * _number(config, "num_key_value_heads", 8 if config["model_type"] == "mistral" else heads)
    attention = {"q": (heads * size, width), "k": (key_value, width), "v": (key_value, width),
                 "o": (width, heads * size)}  # fmt: skip
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    block: Shapes = {}
    for part, shape in attention.items():
        block[f"self_attn.{part}_proj.weight"] = shape
        if (qwen and part != "o") or (not qwen and config.get("attention_bias")):
            block[f"self_attn.{part}_proj.bias"] = shape[:1]
    for part, shape in mlp.items():
        block[f"mlp.{part}_proj.weight"] = shape
        if config.get("mlp_bias"):
            block[f"mlp.{part}_proj.bias"] = shape[:1]
    block |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(_number(config, "num_hidden_layers")):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
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


def _with_biases(prefix: str, weights: Shapes, transposed: bool = False) -> Shapes:
    """A weight and a bias for each of these layers; weights are (out, in) or, transposed, (in, out)."""
    shapes = {}
    for name, shape in weights.items():
        shapes[f"{prefix}{name}weight"] = shape
        shapes[f"{prefix}{name}bias"] = shape[-1:] if transposed else shape[:1]
    return shapes


def resnet50() -> Model:
    """ResNet-50 as torchvision has it. Routing takes its classifier, the only linear layer, for no head."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7), **_with_biases("bn1.", {"": (64,)})}
    channels = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            kernels = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            for i, kernel in enumerate(kernels, start=1):
                shapes |= {f"{name}.conv{i}.weight": kernel, **_with_biases(f"{name}.bn{i}.", {"": kernel[:1]})}
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                shapes |= _with_biases(f"{name}.downsample.1.", {"": (4 * width,)})
            channels = 4 * width
    return _float32("resnet50", shapes | _with_biases("fc.", {"": (1000, channels)}), [])


def vit_b() -> Model:
    """ViT-B/16 as torchvision has it. Its position embedding is a plain parameter, which routing preconditions."""
    width, inner = 768, 3072
    block = {
        "ln_1.": (width,),
        "self_attention.in_proj_": (3 * width, width),
        "self_attention.out_proj.": (width, width),
        "ln_2.": (width,),
        "mlp.0.": (inner, width),
        "mlp.3.": (width, inner),
    }
    shapes: Shapes = {"class_token": (1, 1, width), **_with_biases("conv_proj.", {"": (width, 3, 16, 16)})}
    shapes["encoder.pos_embedding"] = (1, 197, width)
    for layer in range(12):
        shapes |= _with_biases(f"encoder.layers.encoder_layer_{layer}.", block)
    shapes |= _with_biases("encoder.ln.", {"": (width,)}) | _with_biases("heads.head.", {"": (1000, width)})
    return _float32("vit-b", shapes, ["heads.head.weight", "heads.head.bias"])


def _float32(name: str, shapes: Shapes, heads: list[str]) -> Model:
    routes = route_shapes(shapes, heads=heads)
    return Model(name, routes, (torch.float32,) * len(routes))
