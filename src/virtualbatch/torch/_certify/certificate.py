"""Certifying a PyTorch training step, and leaving it as it was."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.diagnosis import broken, certified
from virtualbatch.certify.of_signal import raise_if_of_signal
from virtualbatch.certify.step import check_microbatches, refuse_window
from virtualbatch.torch._batch import read
from virtualbatch.torch._certify.step import LayerState, TorchTrainingStep, wide_batch, widened
from virtualbatch.torch._faults import StatefulLossError
from virtualbatch.torch._microbatch import known_rows
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._undo import Undo, all_or_nothing
from virtualbatch.torch._window import Program


def certificate(
    program: Program, batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Certificate:
    """The certificate of a program; see `virtualbatch.torch.certify`."""
    return all_or_nothing(lambda: _certificate(program, batch, microbatch_size, accumulation_steps))


def _certificate(
    program: Program, batch: Any, microbatch_size: int | None, accumulation_steps: int | None
) -> Certificate:
    with _untouched(program, batch):
        try:
            with widened(program.found.roots):
                return _observed(program, wide_batch(batch), microbatch_size, accumulation_steps)
        except (RuntimeError, TypeError) as error:
            raise_if_of_signal(error)
            note = f"It does not run in float64 ({' '.join(str(error).split())[:120]})."
        return _observed(program, batch, microbatch_size, accumulation_steps, note)


def _observed(
    program: Program, batch: Any, size: int | None, steps: int | None, note: str = ""
) -> Certificate:
    state = LayerState(program.found.roots)
    with Undo(state.restore):
        subject = TorchTrainingStep(program, batch, size, steps, state)
        if note:
            subject.notes = [*subject.notes, note]
        try:
            return certified(subject)
        except StatefulLossError as error:
            return broken(subject, error.finding)


@contextmanager
def _untouched(program: Program, batch: Any) -> Iterator[None]:
    """Puts back gradients and random states. Inside, compiled modules run uncompiled."""
    tensors = [p for root in program.found.roots for p in root.parameters()]
    tensors += [x for _, x in read(batch).whole.tensors() if x.is_leaf and x.requires_grad]
    gradients = [(tensor, tensor.grad) for tensor in tensors]
    random = RandomState(program.found.accelerator)

    def put_back() -> None:
        random.restore()
        for tensor, gradient in gradients:
            tensor.grad = gradient

    with Undo(put_back), uncompiled():
        for tensor, _ in gradients:
            tensor.grad = None
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled modules run uncompiled inside the context."""
    # Loading Dynamo takes seconds. A program with a compiled module has loaded it already.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    stances: list[Any] = []

    def leave() -> None:
        for stance in stances:
            stance.__exit__(None, None, None)

    with Undo(leave):
        stances.append(torch.compiler.set_stance("force_eager"))
        yield


def check_cut(batch: Any, microbatch_size: int | None, accumulation_steps: int | None) -> None:
    """Refuses a cut that leaves nothing to compare.

    Raises:
        ValueError: there is one row, or one micro-batch, or the batch is a Window.
    """
    refuse_window(batch, microbatch_size)
    cut = read(batch).cut(microbatch_size, accumulation_steps)
    check_microbatches([known_rows(piece) for piece in cut])
