"""Two processes inside trainers: their own accumulation and our line, against all rows uncut.

Masked tokens, unequal over ranks and micro-batches, in float64. Prints the largest error of a
gradient relative to the largest entry of that gradient, and fails where our line is not exact.
Needs `pip install "virtualbatch[bench]"`.
"""

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import accelerate
import lightning
import torch
import transformers
from torch import distributed, nn
from torch.distributed.run import main as torchrun
from torch.nn.functional import cross_entropy

import virtualbatch.torch as vb

ROWS, LENGTH, WORDS = 16, 6, 11
HALF = ROWS // 2
# A Llama of the Trainer computes its loss in float32.
LIMITS = {"Hugging Face Trainer": 1e-6, "the same, not across": 1e-6}

torch.manual_seed(0)
IDS = torch.randint(1, WORDS, (ROWS, LENGTH))
# Later rows have more tokens.
KEPT = torch.rand(ROWS, LENGTH) < torch.linspace(0.05, 1.0, ROWS)[:, None]
KEPT[0, 1] = True
LABELS = torch.where(KEPT, IDS, -100)


class Net(nn.Module):
    """Words in, words out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table, self.head = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.tanh(self.table(ids)))
        return logits


def loss_of(model: Callable[[torch.Tensor], torch.Tensor], rows: Any) -> torch.Tensor:
    logits = model(rows["ids"])
    return cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), ignore_index=-100)


def tokens(rows: Any) -> torch.Tensor:
    return (rows["labels"] != -100).sum()


def some(start: int, stop: int) -> dict[str, torch.Tensor]:
    return {"ids": IDS[start:stop], "labels": LABELS[start:stop]}


def own(pieces: int) -> list[dict[str, torch.Tensor]]:
    """The rows of this rank, in so many micro-batches."""
    start, size = HALF * distributed.get_rank(), HALF // pieces
    return [some(start + k * size, start + (k + 1) * size) for k in range(pieces)]


def error(parameters: Iterable[Any], due: Sequence[torch.Tensor]) -> float:
    pairs = [(p.grad, g) for p, g in zip(parameters, due, strict=True) if g.abs().max()]
    return max(float((found - g).abs().max() / g.abs().max()) for found, g in pairs)


def uncut() -> list[torch.Tensor]:
    net = Net().double()
    return list(torch.autograd.grad(loss_of(net, some(0, ROWS)), list(net.parameters())))


def in_accelerate(ours: bool) -> float:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=1 if ours else 2)
    net = Net().double()
    model = accelerator.prepare(net)
    if ours:
        (rows,) = own(1)
        loss = vb.loss(
            lambda b: loss_of(model, b), rows, module=model, microbatch_size=4, weight=tokens
        )
        accelerator.backward(loss)
    else:
        for rows in own(2):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, rows))
    return error(net.parameters(), uncut())


class _Module(lightning.LightningModule):
    def __init__(self, ours: bool):
        super().__init__()
        self.net, self.ours = Net().double(), ours
        self.automatic_optimization = not ours
        self.error = 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)

    def training_step(self, rows: Any, index: int) -> Any:
        if not self.ours:
            return loss_of(self.net, rows)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        vb.backward(
            lambda b: loss_of(self.net, b),
            rows,
            module=self.trainer.strategy.model,
            microbatch_size=4,
            weight=tokens,
        )
        self.error = error(self.net.parameters(), uncut())
        optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if not self.ours:
            self.error = error(self.net.parameters(), uncut())


def in_lightning(ours: bool) -> float:
    module = _Module(ours)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=1 if ours else 2,
        use_distributed_sampler=False,
    )
    pieces: Any = own(1 if ours else 2)
    trainer.fit(module, torch.utils.data.DataLoader(pieces, batch_size=None))
    return module.error


def llama() -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).double()


class _Trainer(transformers.Trainer):
    ours = False

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        if not self.ours:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        return vb.backward(
            lambda batch: self.compute_loss(model, batch),
            dict(self._prepare_inputs(inputs)),
            module=model,
            microbatch_size=4,
            weight=lambda batch: (batch["labels"][:, 1:] != -100).sum(),
        )

    def get_train_dataloader(self) -> Any:
        pieces: Any = [
            {"input_ids": rows["ids"], "labels": rows["labels"]}
            for rows in own(1 if self.ours else 2)
        ]
        return torch.utils.data.DataLoader(pieces, batch_size=None)


class _Look(transformers.TrainerCallback):
    def __init__(self, due: Sequence[torch.Tensor]):
        self.due, self.error = due, 0.0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.error = error(model.parameters(), self.due)


def in_transformers(ours: bool, across: bool = True) -> float:
    whole = llama()
    loss = whole(input_ids=IDS, labels=LABELS).loss
    look = _Look(torch.autograd.grad(loss, list(whole.parameters())))
    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        gradient_accumulation_steps=1 if ours else 2,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        average_tokens_across_devices=across and not ours,
    )
    trainer = _Trainer(model=llama(), args=arguments, train_dataset=[0], callbacks=[look])
    trainer.ours = ours
    trainer.train()
    return look.error


TRAINERS = {
    "Accelerate": in_accelerate,
    "Lightning": in_lightning,
    "Hugging Face Trainer": in_transformers,
    "the same, not across": partial(in_transformers, across=False),
}


def main() -> int:
    if not distributed.is_torchelastic_launched():
        torchrun(["--standalone", "--nproc_per_node=2", *sys.argv])
        return 0
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    missed = 0
    for name, inside in TRAINERS.items():
        own_error, our_error = inside(False), inside(True)
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.state.GradientState._reset_state()
        missed += our_error > LIMITS.get(name, 1e-12)
        if distributed.get_rank() == 0:
            print(f"{name:24} its own {own_error:8.1e}   our line {our_error:8.1e}", flush=True)
    distributed.destroy_process_group()
    return missed


if __name__ == "__main__":
    sys.exit(main())
