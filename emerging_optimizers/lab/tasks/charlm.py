"""`charlm`: a small decoder-only transformer that learns English text character by character.

Shapes: B windows of T characters, width C, H heads; a batch is a pair of int64 tensors (B, T), inputs and targets.
The text is what every Python carries in ``pydoc_data.topics`` (the language reference, about 465,000 characters), or
any UTF-8 file. Its last tenth is for validation.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emerging_optimizers.lab.common import LabError
from emerging_optimizers.lab.tasks import step_generator

CONTEXT = 128  # characters that the model sees
BATCH = 16  # windows per step: 2,048 characters
WIDTH = 128
HEADS = 4
LAYERS = 3
VALIDATION_BATCHES = 8  # of BATCH windows: 16,384 characters, a few per cent of a training interval
SHORTEST_TEXT = 10_000  # characters; a tenth of it still gives several different validation windows


def read_text(path: str | None) -> str:
    """Read the text to learn: a UTF-8 file, or None for Python's own reference text."""
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LabError(f"--text {path}: not UTF-8 (byte {error.start}); convert it first") from error
    except OSError as error:
        raise LabError(f"--text {path}: {error.strerror}; name a readable text file") from error
    if len(text) < SHORTEST_TEXT:
        raise LabError(f"--text {path}: {len(text):,} characters are too few; give at least {SHORTEST_TEXT:,}")
    return text


class Block(nn.Module):
    """One pre-norm transformer layer: causal attention, then a GELU MLP of four times the width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        # Separate matrices rather than one of 3C x C: each has an eigenbasis of its own, and all have one shape.
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed: Tensor = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, C/H)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        grown: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + grown


class Transformer(nn.Module):
    """A decoder-only language model with learned positions and an untied output head, 0.6 million parameters.

    Initialised as torch does by default: with GPT-2's initialisation AdamW is an easier rival.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters (B, T) to logits (B, T, vocabulary)."""
        x = self.tokens(characters) + self.positions.weight[: characters.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class CharLM:
    """Character-level language modelling, of a UTF-8 file or of Python's own reference text.

    Start weights and batches follow from the seed; the validation windows are the same for every one.
    """

    name = "charlm"
    metric = "validation loss, nats/char"
    steps = 500
    eval_every = 10

    def __init__(self, seed: int, text: str | None = None) -> None:
        self.seed = seed
        characters = read_text(text)
        index = {character: i for i, character in enumerate(sorted(set(characters)))}
        data = torch.tensor([index[character] for character in characters])
        self.vocabulary = len(index)
        held_out = len(data) // 10
        self._training, validation = data[:-held_out], data[-held_out:]
        count = min(VALIDATION_BATCHES * BATCH, held_out // CONTEXT)
        starts = torch.linspace(0, held_out - CONTEXT - 1, count).long()
        self._validation = _windows(validation, starts)

    def model(self) -> nn.Module:
        """Make the transformer."""
        return Transformer(self.vocabulary)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw BATCH windows of the training text: inputs and targets, both (B, T) int64."""
        generator = step_generator(self.seed, step)
        return _windows(self._training, torch.randint(len(self._training) - CONTEXT, (BATCH,), generator=generator))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the mean cross-entropy of the next character, in nats."""
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Compute the same loss on fixed, evenly spread windows of the held-out text."""
        inputs, targets = self._validation
        total = 0.0
        for start in range(0, len(inputs), BATCH):
            chunk = inputs[start : start + BATCH], targets[start : start + BATCH]
            total += self.loss(model, chunk).item() * len(chunk[0])
        return total / len(inputs)


def _windows(data: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Cut windows out of a text (N,) at starts (B,): characters (B, T) and the characters that follow them (B, T)."""
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]
