"""Accelerate's documented loop: it takes the mean of the micro-batches' means."""

from typing import Any

from accelerate import Accelerator

from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import PEER, Contender, looped
from virtualbatch.bench.torch_models import Problem
from virtualbatch.bench.torch_ways import weights_of


def contender(name: str, case: Case, given: Problem) -> Contender:
    """The contender of a case."""
    accelerator = Accelerator(cpu=given.batch[0].device.type == "cpu")
    model, optimizer = accelerator.prepare(given.model, given.optimizer)

    def update() -> Any:
        # All Accelerators share this number, and ours refuses to run beside one above 1.
        accelerator.gradient_accumulation_steps = case.accumulation_steps
        total: Any = 0.0
        for piece in given.pieces:
            with accelerator.accumulate(model):
                loss = given.loss(model, piece)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        accelerator.gradient_accumulation_steps = 1
        return total / case.accumulation_steps

    return Contender(name, PEER, looped(update, float), weights_of(given.model))
