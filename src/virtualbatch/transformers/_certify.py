"""Certifies a trainer's update against its whole batch: its own way, and with `accumulate`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from virtualbatch.certify.certificate import Certificate, Finding, derived_tolerance
from virtualbatch.certify.errors import differ, gradient_errors, measured_scales, total_loss
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.step import Observed
from virtualbatch.result import Result
from virtualbatch.torch._certify.step import LayerState, as_array
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._random import RandomState
from virtualbatch.transformers._attributes import PlainAttributes
from virtualbatch.transformers._checks import is_of_pairs
from virtualbatch.transformers._rows import form_of, joined, pad_token_id_of, rows_of
from virtualbatch.transformers._seam import Seam, seam_of
from virtualbatch.transformers._update import Asked

_NO_DROPOUT = "Dropout is off during the comparison."
# Epsilon of float32, in which losses are computed even if the model is wider.
_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class TrainerCertificate(Result):
    """Whether a trainer's update equals the update of its whole batch.

    Args:
        own: the certificate of the trainer's own accumulation.
        accumulated: the certificate of the same trainer with `accumulate`.
    """

    own: Certificate
    accumulated: Certificate

    def __str__(self) -> str:
        return (
            f"The trainer's own update is {self.own}\n"
            f"With virtualbatch.transformers.accumulate it is {self.accumulated}"
        )


def certified(trainer: Any) -> TrainerCertificate:
    """See `virtualbatch.transformers.certify`."""
    seam = seam_of(trainer)
    if seam is not None:
        seam.detach()
    try:
        with _untouched(trainer) as batches:
            return _compared(trainer, batches, seam)
    finally:
        if seam is not None:
            seam.attach()


def _compared(trainer: Any, batches: Sequence[Any], seam: Seam | None) -> TrainerCertificate:
    steps = _Steps(trainer)
    whole = steps.whole(batches)
    turned = steps.whole(batches[::-1])
    own = steps.run(batches)
    accumulated = steps.accumulated(batches, seam)
    epsilon = steps.epsilon()
    # A small difference by the order of rows is rounding. A large one is something else.
    alike = [] if differ(whole, turned, epsilon**0.5) else [turned]
    rows = sum(rows_of(batch, is_of_pairs(trainer)) for batch in batches)
    tolerance = derived_tolerance(epsilon, epsilon, rows)
    scales = measured_scales(whole, alike, tolerance)
    count = len(batches)

    def compared(found: Observed, finding: Finding) -> Certificate:
        errors = gradient_errors(whole, found, scales)
        loss_error = abs(total_loss(whole) - total_loss(found)) / scales.loss
        largest = max(errors.values(), default=0.0)
        exact = max(largest, loss_error) <= tolerance
        findings = () if exact else (finding,)
        return Certificate(exact, largest, tolerance, errors, findings, loss_error, (_NO_DROPOUT,))

    loss = f"the loss of {type(trainer).__name__} on {type(trainer.model).__name__}"
    return TrainerCertificate(
        compared(
            own,
            Finding(
                "weight",
                loss,
                f"The {count} batches of an update are not weighted by what each loss was divided "
                "by.",
                "Call virtualbatch.transformers.accumulate(trainer) before train().",
            ),
        ),
        compared(
            accumulated,
            Finding(
                "coupled_rows",
                loss,
                "Its gradients do not add up to that of the whole batch with any of the weights "
                "tried.",
                "Pass weight= to accumulate, or train the batch uncut.",
            ),
        ),
    )


class _Steps:
    """Runs updates of a trainer without the optimizer, and reads the gradients in `.grad`.

    Args:
        trainer: the trainer, without `accumulate`.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._model = trainer.model
        self._attributes = PlainAttributes(trainer, nested=True)
        self._layers = LayerState([trainer.model])
        self._drawn = RandomState(inventory(trainer.model).accelerator)

    def run(self, batches: Sequence[Any]) -> Observed:
        """The trainer's own update with the given batches."""
        trainer, model = self._trainer, self._model
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        device = trainer.args.device
        samples, items = trainer.get_batch_samples(iter(batches), len(batches), device)
        trainer.current_gradient_accumulation_steps = len(samples)
        loss = 0.0
        with _NoDropout():
            for left, inputs in enumerate(samples, 1 - len(samples)):
                trainer.accelerator.gradient_state._set_sync_gradients(not left)
                loss += float(trainer.training_step(model, _copied(inputs), items))
        gradients = {
            name: None if parameter.grad is None else as_array(parameter.grad).astype(np.float64)
            for name, parameter in parameters.items()
        }
        for parameter in parameters.values():
            parameter.grad = None
        self._layers.restore()
        self._drawn.restore()
        self._attributes.restore()
        return Observed({"loss": loss}, gradients, {})

    def whole(self, batches: Sequence[Any]) -> Observed:
        """The update of all rows at once.

        Raises:
            ValueError: batches have no common rows.
        """
        pad_token_id = pad_token_id_of(self._model)
        forms = [form_of(batch, is_of_pairs(self._trainer), pad_token_id) for batch in batches]
        form = forms[0]
        if form is None or any(each != form for each in forms):
            raise ValueError(
                "A whole batch is made of the rows of its micro-batches. Got inputs without common "
                "rows. Return tensors with one entry per row from the data collator."
            )
        return self.run([form.inputs(joined([form.by_row(batch) for batch in batches], form))])

    def accumulated(self, batches: Sequence[Any], seam: Seam | None) -> Observed:
        """The update with `accumulate`, with the arguments of its call, or without a size."""
        used = Seam(self._trainer, Asked()) if seam is None else seam
        used.attach()
        try:
            return self.run(batches)
        finally:
            used.detach()

    def epsilon(self) -> float:
        """Epsilon of the narrowest dtype that is known to be used."""
        found = [p.dtype for p in self._model.parameters() if p.requires_grad]
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}
        mixed = precision.get(self._trainer.accelerator.mixed_precision)
        dtypes = [*found, *([] if mixed is None else [mixed])]
        # Even in float64 models, norms and losses are computed in float32.
        return float(max(_EPSILON, *(torch.finfo(dtype).eps for dtype in dtypes)))


class _NoDropout(TorchFunctionMode):
    """Turns dropout off while layers stay in training mode: other cuts draw other numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return kwargs.get("input", args[0] if args else None)
        if func is torch.nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _untouched(trainer: Any) -> Iterator[list[Any]]:
    """Yields the batches of a first update. Afterwards the trainer is as it was before."""
    device = inventory(trainer.model).accelerator
    random, host = RandomState(device), HostRandom()
    layers, attributes = LayerState([trainer.model]), PlainAttributes(trainer, nested=True)
    gradients = [(parameter, parameter.grad) for parameter in trainer.model.parameters()]
    is_synchronised = trainer.accelerator.gradient_state.sync_gradients
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield _first_update(trainer)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        trainer.accelerator.gradient_state._set_sync_gradients(is_synchronised)
        layers.restore()
        attributes.restore()
        random.restore()
        host.restore()


def _first_update(trainer: Any) -> list[Any]:
    count = trainer.args.gradient_accumulation_steps
    loader = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(loader, count, trainer.args.device)
    if len(batches) < 2:
        raise ValueError(
            "An update is certified by comparing its batches with all of them at once. "
            f"Got {len(batches)} batch from gradient_accumulation_steps={count}. "
            "Train with gradient_accumulation_steps of 2 or more and smaller batches."
        )
    return [trainer._prepare_inputs(batch) for batch in batches]


def _copied(inputs: Any) -> Any:
    return dict(inputs) if isinstance(inputs, dict) else inputs
