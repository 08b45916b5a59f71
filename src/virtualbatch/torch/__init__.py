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
from virtualbatch.window.terms import AuxLossFn, GivenWeight, LossFn
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


def captured(loss_fn: LossFn) -> Captured:
    """A loss function for `backward` whose micro-batches run as CUDA graphs.

    Where micro-batches are small, a GPU waits for Python to launch kernels. A graph launches all
    kernels of a forward and backward pass at once. A shape is captured when it is seen for the
    second time, and at most eight shapes are. Each graph keeps the activations of one micro-batch
    allocated, and all graphs together keep one more set of gradients. Random numbers are drawn
    anew in each micro-batch.

    Python runs when a graph is captured, and not when it is replayed. So three rules hold for the
    loss function. Tensors beside the batch must stay where they are in memory. Numbers and
    branches keep the values that they had at the capture. Any other effect, such as a print,
    happens once. A change of `training`, of autocast or of the place of parameters is noticed, and
    the shape is captured again.

    A window takes the normal path, and the log says why, without CUDA, with BatchNorm in training
    mode, with parameters in half precision, with `has_aux`, `stats` or `backward_fn`, with sparse
    gradients, and where the loss reads values on the host.

    Args:
        loss_fn: a function of a micro-batch that returns a scalar mean, or a dict of terms. See
            `backward`.

    Returns:
        A function that returns what `loss_fn` returns. Make it once and pass it to each
        `backward`. Its graphs are freed with it.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> loss_fn = captured(lambda x: model(x).mean())
        >>> loss = backward(loss_fn, torch.ones(4, 2), module=model, microbatch_size=2)
    """
    return Captured(loss_fn)


@undone_if_cut
def plan(
    loss_fn: LossFn | AuxLossFn | Rowwise[Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    weight: GivenWeight = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    memory_limit: int | str | None = None,
) -> Plan:
    """Finds the micro-batch size that fits in memory and is fast, before you train.

    Peak memory comes from a window on fake tensors, which have shapes and no values. Where the
    loss needs values, a real window is run. Peak memory grows linearly with the micro-batch size,
    so two or three measurements predict every size. Then a few sizes are timed, for at most ten
    seconds, on a few of their micro-batches each. The smallest size within 2 % of the fastest is
    chosen.

    Parameters, `.grad` values, buffers and random states are as before the call.

    Args:
        loss_fn: a function of a batch that returns its mean loss, as for `backward`; or a function
            that `rowwise` returned, whose size is then planned.
        batch: the whole batch, in the form that you train with. A `Window` is refused.
        module: the module, or all modules, whose parameters and buffers the loss uses.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `backward`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.
        backward_fn: a function of the scalar loss that computes the gradients, where
            `loss.backward()` is not enough.
        memory_limit: the bytes that parameters, buffers, gradients, the batch and activations may
            take together. Optimizer state is not counted, so leave room for it. Pass a number of
            bytes, a text such as `"2GiB"`, or a share such as `"80%"` of what they may take now.
            None means all that the device, or the container of this process, has free.

    Returns:
        The plan. Its peaks count tensors. They do not count what the allocator rounds up, or
        workspace inside kernels.

    Raises:
        ValueError: not even one row fits, the limit does not parse, or the batch is a `Window`.
        ValueError: an argument is wrong as in `backward`.
        TypeError: an argument has the wrong type.

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
    loss_fn: LossFn | AuxLossFn | Rowwise[Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
) -> Certificate:
    """Proves that accumulation gives the gradient of the whole batch, or names what breaks it.

    The batch runs uncut and in micro-batches, with the same random numbers for the same rows, and
    the two gradients are compared. So the batch must fit in memory uncut.

    Both runs are in float64: parameters, buffers and floating tensors of the batch are widened for
    the call. Where the model does not run in float64, both runs are in its own dtype. The notes of
    the certificate name the dtype. The tolerance follows from that dtype and the number of rows.
    Do not expect that tolerance of float32 training: an uncut float32 run differs from a float64
    run by more than that, before anything is accumulated.

    Parameters, buffers, `.grad` values, attributes of layers and random states are as before the
    call.

    Args:
        loss_fn: a function of a batch that returns its mean loss, as for `backward`; or a function
            that `rowwise` returned. Then a random sum of its outputs is the loss.
        batch: the whole batch, with two rows or more. A `Window` is refused.
        module: the module, or all modules, whose parameters and buffers the loss uses.
        microbatch_size: the rows of one forward and backward. `"auto"` is refused. For a `rowwise`
            function the size that it was made with is used if you pass none.
        accumulation_steps: the micro-batches per window, instead of a size.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `backward`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The certificate, with the error of each parameter and named findings.

    Raises:
        ValueError: there is only one row or one micro-batch, or an argument is wrong as in
            `backward`.
        TypeError: an argument has the wrong type.

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
