"""Hugging Face's Trainer with `gradient_accumulation_steps`, alone and with our line.

If the model takes `num_items_in_batch`, as Hugging Face's language models do, the Trainer divides
by the tokens of the window, and the update is right.

With our line, the first update of each trainer finds the weight. Each round makes a new trainer. So
a round of few updates shows more of that cost than training does.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader, Dataset

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import OURS, PEER, Contender
from virtualbatch.bench.stopwatch import TimedPieces
from virtualbatch.bench.torch_models import Problem, token_sum
from virtualbatch.bench.torch_ways import weights_of
from virtualbatch.transformers import accumulate


class _Rows(nn.Module):
    """A model whose loss is a mean over rows."""

    def __init__(self, given: Problem):
        super().__init__()
        self.given = given
        self.model = given.model

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {"loss": self.given.loss(self.model, (x, labels))}


class _Tokens(_Rows):
    """A model that receives the number of tokens by which to divide."""

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any = None, **more: Any
    ) -> dict[str, Any]:
        return {"loss": token_sum(self.model, (x, labels.relu())) / num_items_in_batch}


class _Pieces(Dataset[Any]):
    def __init__(self, pieces: TimedPieces):
        self._found = iter(pieces)
        self._number = len(pieces)

    def __len__(self) -> int:
        return self._number

    def __getitem__(self, index: int) -> Any:
        return next(self._found)


class _Trainer(transformers.Trainer):
    def get_train_dataloader(self) -> Any:
        # Micro-batches are cut already, as for the other contenders.
        loader = DataLoader(self.train_dataset, batch_size=None)
        # With several ranks, each gets its own micro-batches. `prepare` would divide them again.
        return loader if torch.distributed.is_initialized() else self.accelerator.prepare(loader)


class _Updates(transformers.TrainerCallback):
    def __init__(self, pieces: TimedPieces):
        self._pieces = pieces

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._pieces.updated()


def contender(name: str, case: Case, given: Problem) -> Contender:
    """The contender of a case."""
    return _trained(name, PEER, case, given, lambda trainer: trainer)


def with_us(name: str, case: Case, given: Problem) -> Contender:
    """Hugging Face's Trainer with our line."""
    return _trained(name, OURS, case, given, accumulate)


def _trained(
    name: str, role: str, case: Case, given: Problem, prepared: Callable[[Any], Any]
) -> Contender:
    transformers.utils.logging.set_verbosity_error()
    tokens = case.model == "tokens"
    model = (_Tokens if tokens else _Rows)(given)
    # Labels of padding are negative, as from Hugging Face's collators. So it counts the tokens.
    named = [
        {"x": x, "labels": y.masked_fill(x == 0, -100) if tokens else y} for x, y in given.pieces
    ]
    constant = torch.optim.lr_scheduler.LambdaLR(given.optimizer, lambda update: 1.0)

    def train(updates: int) -> float:
        pieces = TimedPieces(named, updates)
        with tempfile.TemporaryDirectory() as folder:
            trainer = _Trainer(
                model,
                transformers.TrainingArguments(
                    folder,
                    max_steps=updates,
                    per_device_train_batch_size=case.microbatch_size,
                    gradient_accumulation_steps=case.accumulation_steps,
                    max_grad_norm=0.0,
                    save_strategy="no",
                    logging_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                    use_cpu=True,
                    remove_unused_columns=False,
                ),
                train_dataset=_Pieces(pieces),
                optimizers=(given.optimizer, constant),
                callbacks=[_Updates(pieces)],
            )
            # This callback prints a line at the end of every training.
            trainer.remove_callback(transformers.PrinterCallback)
            prepared(trainer).train()
        return pieces.seconds

    return Contender(name, role, train, weights_of(given.model))
