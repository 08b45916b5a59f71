"""The PyTorch engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes micro-batches, their weights become shares, each micro-batch's share is
differentiated in turn, and the sum is added to `.grad` once all of them have succeeded.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from virtualbatch.split import Window, windows
from virtualbatch.terms import loss_and_aux
from virtualbatch.torch._aux import detached, merged_aux
from virtualbatch.torch._batch import Microbatch, microbatches, on_device
from virtualbatch.torch._batchnorm import MergedStatistics
from virtualbatch.torch._checks import check_call, refuse_foreign_accumulation
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._loss import WindowLoss, checked_terms
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._state import Buffers
from virtualbatch.torch._weights import Shares, window_shares

__all__ = ["Window", "backward", "windows"]


def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: torch.nn.Module | Iterable[torch.nn.Module],
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
) -> Any:
    """Does what `loss_fn(batch).backward()` does, on the memory of a micro-batch.

    Gradients are added to `.grad`, as PyTorch adds them. BatchNorm layers of the modules take one
    momentum update. If anything raises, every `.grad`, buffer, momentum and hook of the modules
    is as before the call.

    Args:
        loss_fn: batch -> scalar mean, or a dict of term names to scalar means whose sum is the
            loss. With `has_aux=True` it returns (loss, aux).
        batch: nested dicts, lists, tuples and dataclasses of tensors that share their leading
            axis, the rows; or a `Window`, and then no size is given. Tensors on the host are
            copied to the device of the modules, one micro-batch at a time.
        module: the module, or all modules, whose parameters and buffers the loss uses.
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per window: `microbatch_size = ceil(rows / steps)`.
        weight: micro-batch -> what its mean was divided by, a scalar >= 0 (rows when None); for
            a dict of terms a dict with the same keys, None marking a term that does not depend
            on the rows. It gets the micro-batch where the batch is, before it is copied.
        has_aux: whether `loss_fn` returns something beside the loss. Leaves of aux with one entry
            per row come back concatenated in row order, other floating leaves averaged by rows,
            integers summed, all detached.
        backward_fn: scalar loss -> None, where gradients are to be computed by something else
            than `loss.backward()`, such as `lambda loss: scaler.scale(loss).backward()`.

    Returns:
        The mean loss of the whole batch, a detached scalar of the loss's dtype and device; with
        `has_aux=True` (loss, aux).

    Raises:
        ValueError: sizes are not positive integers or disagree, rows differ or are missing, a
            weight is negative or not finite, the loss is not a scalar or has no gradient, names
            of terms differ, there is no trainable parameter, or another library accumulates too.
        TypeError: the loss is not a floating tensor, or an argument is of the wrong kind.
        RuntimeError: a BatchNorm layer in training mode was not called as a module.

    Source:
        The law in docs/law.md.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> loss = backward(lambda x: model(x).mean(), rows, module=model, microbatch_size=2)
        >>> print(f"{loss:.3f}", model.weight.grad.numpy().round(3))
        1.333 [[0.667 0.667]]
    """
    functions = {"loss_fn": loss_fn, "weight": weight, "backward_fn": backward_fn}
    check_call(functions, batch, microbatch_size, accumulation_steps)
    found = inventory(module)
    refuse_foreign_accumulation()
    cut = microbatches(batch, microbatch_size, accumulation_steps)
    shares = window_shares(cut, weight)
    if found.accelerator is not None:
        cut = [on_device(microbatch, found.accelerator) for microbatch in cut]

    buffers = Buffers(found.with_buffers)
    statistics = MergedStatistics(found.with_buffers, buffers)
    gradients = WindowGradients(found.parameters, backward_fn)
    try:
        gradients.start()
        with statistics.attached() if statistics else nullcontext():
            run = _Run(loss_fn, has_aux, statistics, gradients)
            loss, aux = run.window(cut, shares)
            result = (loss, merged_aux(loss_fn, cut, aux, shares.rows)) if has_aux else loss
        statistics.commit()
        gradients.commit()
    except BaseException:
        gradients.restore()
        buffers.restore()
        raise
    return result


class _Run(NamedTuple):
    """The micro-batches of one window, one after another."""

    loss_fn: Callable[[Any], Any]
    has_aux: bool
    statistics: MergedStatistics
    gradients: WindowGradients

    def window(self, cut: Sequence[Microbatch], shares: Shares) -> tuple[torch.Tensor, list[Any]]:
        """The loss of the window, and the aux of each micro-batch if it is asked for."""
        loss_fn, has_aux, statistics, gradients = self
        forward = statistics.heard(loss_fn) if statistics else loss_fn
        empty = shares.empty()
        # A window without any weight has the loss 0 and, where one micro-batch reaches a
        # parameter, the gradient 0.
        nothing = all(empty)
        # Rows without weight still meet aux and BatchNorm, as they do in the whole batch.
        run_all = has_aux or bool(statistics)
        loss = WindowLoss()
        auxes: list[Any] = []
        for index, microbatch in enumerate(cut):
            counts = not empty[index] or (nothing and index == 0)
            if not (counts or run_all):
                continue
            result = forward(microbatch.get())
            if has_aux:
                result, aux = loss_and_aux(result, has_aux)
                auxes.append(detached(aux))
                del aux
            terms = checked_terms(result)
            parts = shares.of(terms, index)
            if counts:
                parts = [1.0] * len(parts) if nothing else parts
                gradients.add(terms.values(), parts)
                loss.add(terms.values(), parts)
            # Two graphs at once would hold two sets of activations.
            del result, terms
        if not gradients.found_any:
            raise ValueError(
                "A loss must depend on a trainable parameter. Got one without a gradient. "
                "Compute it from the output of the module, without detach() or item()."
            )
        if not nothing:
            return loss.mean(), auxes
        gradients.zero()
        return torch.zeros_like(loss.mean()), auxes
