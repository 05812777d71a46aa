"""The weight matrices of models that people train: what an optimizer's step is timed on.

Embeddings, norms and biases are left out: every optimizer gives them plain Adam.
"""


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
