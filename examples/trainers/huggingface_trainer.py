"""Trains a small GPT-2 on text with SOAP in the Trainer of Hugging Face's transformers. Downloads nothing.

    python examples/trainers/huggingface_trainer.py --output runs/trainer
    python examples/trainers/huggingface_trainer.py --output runs/trainer --resume

Learning rate, weight decay, warm-up, clipping, mixed precision and checkpoints stay where they are with AdamW: in
``TrainingArguments``. With ``--groups trainer`` SOAP takes Trainer's parameter groups as they are, which needs no class
but preconditions the embeddings.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from emerging_optimizers.routing import route_parameters
from emerging_optimizers.soap import SOAP

CONTEXT = 64  # bytes that the model sees

Windows = list[dict[str, torch.Tensor]]  # of input_ids and labels (CONTEXT,)


class SOAPTrainer(Trainer):
    """A Trainer that trains with SOAP, and with AdamW what an eigenbasis does not suit."""

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Divides Trainer's groups, with and without weight decay, by the routing."""
        if self.optimizer is None:
            model = self.model if model is None else model
            routing = route_parameters(model, head="lm_head")
            names = set(self.get_decay_parameter_names(model))  # not biases and norms
            decayed = [p for name, p in model.named_parameters() if name in names]
            others = [p for name, p in model.named_parameters() if name not in names]
            groups = routing.split(
                [
                    {"params": decayed, "weight_decay": self.args.weight_decay},
                    {"params": others, "weight_decay": 0.0},
                ]
            )
            lr = self.args.learning_rate
            self.optimizer = SOAP(groups, lr=lr, precondition_frequency=10)
        return self.optimizer


def plain_trainer(model: nn.Module, args: TrainingArguments, windows: Windows) -> Trainer:
    """SOAP on Trainer's own groups. The weight decay is that of ``args``."""
    options = {"lr": args.learning_rate, "precondition_frequency": 10}
    return Trainer(model, args, train_dataset=windows, optimizer_cls_and_kwargs=(SOAP, options))


def make_model() -> GPT2LMHeadModel:
    """A GPT-2 of two layers whose tokens are bytes; the head shares the weight of the token embedding."""
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def make_windows() -> Windows:
    """The language reference that every Python carries, in windows of bytes. The model itself shifts the labels."""
    data = torch.frombuffer(bytearray("\n\n".join(topics.values()).encode()), dtype=torch.uint8).long()
    return [{"input_ids": window, "labels": window} for window in data[: len(data) // CONTEXT * CONTEXT].split(CONTEXT)]


def describe(optimizer: Optimizer, model: nn.Module) -> None:
    """Prints what became of each parameter group."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        held: dict[str, list[str]] = {"SOAP": [], "AdamW": []}
        for parameter in group["params"]:
            has_basis = any(key.startswith("Q_") for key in optimizer.state[parameter])
            held["SOAP" if has_basis else "AdamW"].append(names[parameter])
        for kind, members in held.items():
            if members:
                print(f"{kind}, weight decay {group['weight_decay']}: {members[0]} and {len(members) - 1} more")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FOLDER", help="for checkpoints")
    add("--resume", action="store_true", help="go on from FOLDER's last checkpoint")
    add("--groups", choices=["routed", "trainer"], default="routed", help="parameter groups; default: %(default)s")
    add("--steps", type=int, default=60, help="of the optimizer, in all; default: %(default)s")
    add("--save-every", type=int, default=20, metavar="N", help="steps; default: %(default)s")
    add("--lr", type=float, default=0.01, help="largest learning rate; default: %(default)s")
    add("--bf16", action="store_true", help="products in bfloat16 (autocast)")
    options = parser.parse_args()

    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(options.output),
        use_cpu=not torch.cuda.is_available(),  # several processes without GPUs are one run only if this is said
        max_steps=options.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=options.lr,
        weight_decay=0.01,
        warmup_steps=options.steps // 10,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
        bf16=options.bf16,
        save_steps=options.save_every,
        logging_steps=10,
        disable_tqdm=True,
        report_to="none",
    )
    model, windows = make_model(), make_windows()
    if options.groups == "routed":
        trainer = SOAPTrainer(model, args, train_dataset=windows)
    else:
        trainer = plain_trainer(model, args, windows)
    trainer.train(resume_from_checkpoint=options.resume)

    describe(trainer.optimizer, model)


if __name__ == "__main__":
    main()
