"""Accelerate's documented loop, which averages the means of micro-batches, and our loss in it."""

from typing import Any

from accelerate import Accelerator

import virtualbatch.torch as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import OURS, PEER, Contender, looped
from virtualbatch.bench.torch_models import Problem
from virtualbatch.bench.torch_ways import weights_of


def contender(name: str, case: Case, given: Problem) -> Contender:
    """The contender of a case."""
    accelerator = Accelerator(cpu=given.batch[0].device.type == "cpu")
    model, optimizer = accelerator.prepare(given.model, given.optimizer)

    def update() -> Any:
        # All Accelerators share this number. Ours refuses to run if it is above 1.
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


def with_us(name: str, case: Case, given: Problem) -> Contender:
    """Accelerate's loop on whole batches, with our loss of a window."""
    accelerator = Accelerator(cpu=given.batch[0].device.type == "cpu")
    model, optimizer = accelerator.prepare(given.model, given.optimizer)

    def update() -> Any:
        loss = vb.loss(
            lambda batch: given.loss(model, batch),
            given.batch,
            module=model,
            microbatch_size=case.microbatch_size,
            weight=given.weight,
        )
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Contender(name, OURS, looped(update, float), weights_of(given.model))
