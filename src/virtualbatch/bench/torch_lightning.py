"""Lightning's Trainer with `accumulate_grad_batches`, which averages means; and with our line."""

import logging
import warnings
from typing import Any

import lightning
import torch

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import OURS, PEER, Contender
from virtualbatch.bench.stopwatch import TimedPieces
from virtualbatch.bench.torch_models import Problem
from virtualbatch.bench.torch_ways import weights_of
from virtualbatch.lightning import accumulate


class _Module(lightning.LightningModule):
    def __init__(self, given: Problem):
        super().__init__()
        self.given = given
        self.model = given.model

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return self.given.loss(self.model, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.given.optimizer


class _Updates(lightning.Callback):
    def __init__(self, pieces: TimedPieces, every: int):
        self._pieces = pieces
        self._every = every

    def on_train_batch_end(self, trainer: Any, module: Any, out: Any, batch: Any, i: int) -> None:
        if (i + 1) % self._every == 0:
            self._pieces.updated()


def contender(name: str, case: Case, given: Problem) -> Contender:
    """The contender of a case."""
    return _trained(name, PEER, case, given, _Module(given))


def with_us(name: str, case: Case, given: Problem) -> Contender:
    """Lightning's Trainer with a module that accumulates by our line."""
    return _trained(name, OURS, case, given, accumulate(_Module(given), weight=given.weight))


def _trained(
    name: str, role: str, case: Case, given: Problem, module: lightning.LightningModule
) -> Contender:
    # Lightning logs every start and gives advice on loaders of many processes.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    distributed = torch.distributed
    ranks = distributed.get_world_size() if distributed.is_initialized() else 1

    def train(updates: int) -> float:
        pieces = TimedPieces(given.pieces, updates)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            use_distributed_sampler=False,
            accumulate_grad_batches=case.accumulation_steps,
            max_epochs=1,
            callbacks=[_Updates(pieces, case.accumulation_steps)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, pieces)
        return pieces.seconds

    return Contender(name, role, train, weights_of(given.model))
