"""The PyTorch engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes micro-batches, their weights become shares, each micro-batch's share is
differentiated in turn, and the sum is added to `.grad` once all of them have succeeded.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.row_by_row import of_rows
from virtualbatch.plan.plan import Plan
from virtualbatch.torch._backward import backward
from virtualbatch.torch._batch import read
from virtualbatch.torch._call import Trained
from virtualbatch.torch._capture import Captured
from virtualbatch.torch._certify.certificate import certificate, check_cut
from virtualbatch.torch._certify.loop import certify_loop
from virtualbatch.torch._checks import check_call, check_recording, refuse_foreign_accumulation
from virtualbatch.torch._deferred import loss
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._plan.plan import planned
from virtualbatch.torch._replicas.found import quiet, refuse_replicas
from virtualbatch.torch._replicas.stream import windows
from virtualbatch.torch._rowwise.proof import with_numbers
from virtualbatch.torch._rowwise.rowwise import Rowwise, rowwise
from virtualbatch.torch._rowwise.surrogate import Surrogate, refuse_options
from virtualbatch.torch._undo import undone_if_cut
from virtualbatch.torch._window import Program
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.window import Window

__all__ = [
    "Window",
    "backward",
    "captured",
    "certify",
    "certify_loop",
    "loss",
    "plan",
    "rowwise",
    "windows",
]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
    return __all__


def captured(loss_fn: Callable[[Any], Any]) -> Captured:
    """A loss function for `backward` whose micro-batches run as CUDA graphs.

    Where micro-batches are small, a GPU waits for Python to launch its kernels. A graph launches
    those of forward and backward at once. Shapes are captured when they are seen for the second
    time, eight at the most; activations of one micro-batch of each shape stay allocated, and one
    more gradient. What is drawn at random is drawn anew in each micro-batch.

    Python runs when a graph is captured, and not when it is replayed. So the loss function may
    use tensors beside the batch only if they stay where they are, its numbers and branches are
    those of the capture, and whatever else it does happens once. A change of `training`, of
    autocast or of where parameters are is seen, and captured anew. Without CUDA, and with
    BatchNorm in training mode, half-precision parameters, `has_aux`, `stats`, `backward_fn`,
    sparse gradients or a loss that reads values on the host, windows take the normal path, and the
    log says why.

    Args:
        loss_fn: micro-batch -> scalar mean, or a dict of terms; see `backward`.

    Returns:
        A function that returns what `loss_fn` returns. Make it once, and pass it to each
        `backward`; when it is dropped, its graphs are.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = captured(lambda x: model(x).mean())
        >>> loss = backward(loss_fn, torch.ones(4, 2), module=model, microbatch_size=2)
    """
    return Captured(loss_fn)


@undone_if_cut
def plan(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    weight: GivenWeight = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    memory_limit: int | str | None = None,
) -> Plan:
    """Finds the micro-batch that fits and is fast, before anything is trained.

    Peak memory comes from a window on fake tensors, which have shapes and hold nothing; where a
    loss needs values, from a window that is run. It grows linearly with the micro-batch size, so
    two or three measurements predict every size. Then a few sizes are timed, by as many of their
    micro-batches as take a moment, for ten seconds at the most; the smallest within 2 % of the
    fastest is chosen.
    Parameters, `.grad`s, buffers and random states are as before the call.

    Args:
        loss_fn: as in `backward`, like all arguments that are not explained here; or a `rowwise`
            function of a batch, whose size is to be found.
        batch: a batch, not a Window.
        module: as in `backward`.
        weight: as in `backward`.
        has_aux: as in `backward`.
        backward_fn: as in `backward`.
        memory_limit: what parameters, buffers, gradients, the batch and activations may take
            together, such as the 2 * 2**30 or "2GiB" that a budget leaves beside optimizer
            state, or "80%" of what they may take now; None for all that the device, or the
            container that this process is in, has left besides what is held already.

    Returns:
        The plan. Peaks count tensors, not what an allocator rounds up or kernels take in passing.

    Raises:
        ValueError: not even one row fits, a limit does not parse, or the batch is already cut.
        TypeError: see `backward`.

    Example:
        >>> model = torch.nn.Linear(64, 256)
        >>> batch = torch.ones(512, 64)
        >>> found = plan(lambda x: model(x).mean(), batch, module=model, memory_limit="400KiB")
        >>> found.microbatch_size < 512
        True
    """
    check_flags(has_aux=has_aux)
    functions = {"loss_fn": loss_fn, "weight": weight, "backward_fn": backward_fn}
    check_call(functions, batch, "auto", None)
    check_recording()
    found = inventory(module)
    refuse_foreign_accumulation()
    program = Program(loss_fn, weight, has_aux, backward_fn, found)
    if isinstance(loss_fn, Rowwise):
        refuse_options(weight, has_aux)
        program = Surrogate(loss_fn.fn, (), found).of_rows()
    with quiet(found):
        return planned(program, read(batch), memory_limit)


@undone_if_cut
def certify(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
) -> Certificate:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, in float64 where the model can, with the same random
    numbers for the same rows; so it must fit in memory uncut. Parameters, buffers, `.grad`s,
    attributes of layers and random states are as before the call.

    Args:
        loss_fn: as in `backward`, like all arguments that are not explained here; or a `rowwise`
            function of a batch, which is certified by its outputs times random numbers.
        batch: a batch, not a Window.
        module: as in `backward`.
        microbatch_size: rows of one forward and backward; of a `rowwise` function its own if
            neither this nor the number of micro-batches is given.
        accumulation_steps: micro-batches per window.
        weight: as in `backward`.
        has_aux: as in `backward`.

    Returns:
        The certificate, with the error of each parameter and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch; else see `backward`.
        TypeError: see `backward`.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.arange(12.0).reshape(6, 2)
        >>> batch = {"x": x, "mask": torch.tensor([1.0, 1, 1, 1, 0, 0])}
        >>> def loss_fn(batch):
        ...     return (model(batch["x"])[:, 0] ** 2 * batch["mask"]).sum() / batch["mask"].sum()
        >>> certify(loss_fn, batch, module=model, microbatch_size=3).findings[0].fix
        "Pass weight=lambda batch: batch['mask'].sum()."
    """
    check_flags(has_aux=has_aux)
    if isinstance(loss_fn, Rowwise):
        refuse_options(weight, has_aux)
        if microbatch_size is None and accumulation_steps is None:
            microbatch_size, accumulation_steps = loss_fn.size()
    check_call({"loss_fn": loss_fn, "weight": weight}, batch, microbatch_size, accumulation_steps)
    check_recording()
    found = inventory(module)
    refuse_replicas(found)
    refuse_foreign_accumulation()
    check_cut(batch, microbatch_size, accumulation_steps)
    program = Program(loss_fn, weight, has_aux, None, found)
    if isinstance(loss_fn, Rowwise):
        program, batch = with_numbers(Surrogate(loss_fn.fn, (), found), batch)
        return of_rows(certificate(program, batch, microbatch_size, accumulation_steps))
    return certificate(program, batch, microbatch_size, accumulation_steps)
