"""The weight matrices of models that people train: what an optimizer's step is timed on.

Embeddings, norms and biases are left out of :data:`PARAMETER_SETS`: every optimizer gives them plain Adam.
:data:`MODELS` have them too, for what they cost in state and, where weights are in pieces, in nothing else.
"""

from typing import NamedTuple


def gpt(width: int, layers: int) -> list[tuple[int, ...]]:
    """Attention and feed-forward weights of a GPT block, as often as there are layers."""
    return layers * [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def resnet50() -> list[tuple[int, ...]]:
    """The convolutions of torchvision's ResNet-50, without the classifier."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


PARAMETER_SETS: dict[str, list[tuple[int, ...]]] = {
    "gpt-d128x8": gpt(128, 8),
    "gpt-d512x2": gpt(512, 2),
    "gpt2-124m": gpt(768, 12),
    "gpt-1.3b-quarter": gpt(2048, 6),  # of its 24 layers: several optimizers must fit beside each other
    "vit-b": [(768, 768), *gpt(768, 12)],
    "resnet50": resnet50(),
}


class Weight(NamedTuple):
    """One parameter of a model, and whether it is preconditioned or gets plain AdamW."""

    name: str
    shape: tuple[int, ...]
    preconditioned: bool


def gpt_model(width: int, layers: int, vocabulary: int, context: int, biases: bool = True) -> list[Weight]:
    """All parameters of a GPT with learned positions and a head tied to the embedding, as ``routing`` routes them."""
    model = [Weight("embedding", (vocabulary, width), False), Weight("positions", (context, width), False)]
    for layer in range(layers):
        for name, shape in zip(("qkv", "out", "up", "down"), gpt(width, 1), strict=True):
            model.append(Weight(f"{layer}.{name}", shape, True))
            if biases:
                model.append(Weight(f"{layer}.{name}.bias", shape[:1], False))
        model += _norms(f"{layer}.norm", width, 2, biases)
    return model + _norms("norm", width, 1, biases)


def _norms(name: str, width: int, count: int, biases: bool) -> list[Weight]:
    kinds = ("weight", "bias") if biases else ("weight",)
    return [Weight(f"{name}{number}.{kind}", (width,), False) for number in range(count) for kind in kinds]


def llama(width: int, layers: int, hidden: int, key_width: int, vocabulary: int) -> list[Weight]:
    """All parameters of a Llama with grouped queries and a head of its own."""
    block = {
        "q": (width, width),
        "k": (key_width, width),
        "v": (key_width, width),
        "o": (width, width),
        "gate": (hidden, width),
        "up": (hidden, width),
        "down": (width, hidden),
    }
    model = [Weight("embedding", (vocabulary, width), False)]
    for layer in range(layers):
        model += [Weight(f"{layer}.{name}", shape, True) for name, shape in block.items()]
        model += _norms(f"{layer}.norm", width, 2, False)
    return [*model, *_norms("norm", width, 1, False), Weight("head", (vocabulary, width), False)]


MODELS: dict[str, list[Weight]] = {
    "GPT-2 124M": gpt_model(768, 12, 50257, 1024),
    "GPT-3 1.3B": gpt_model(2048, 24, 50257, 2048),
    "Llama-3 8B": llama(4096, 32, 14336, 1024, 128256),
    "Llama-3 70B": llama(8192, 80, 28672, 1024, 128256),
}
