"""The PyTorch engine: the gradient of a whole batch, computed a micro-batch at a time.

A batch becomes micro-batches, their weights become shares, each micro-batch's share is
differentiated in turn, and the sum is added to `.grad` once all of them have succeeded.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, overload

import torch

from virtualbatch.certify.certificate import Certificate
from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto, CurrentSize, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.retry import Memory, run_as_it_is, run_until_it_fits
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._batch import Microbatch, ReadBatch, most_rows, read
from virtualbatch.torch._capture import Captured
from virtualbatch.torch._certify.certificate import certificate, check_cut
from virtualbatch.torch._certify.first_window import prove_first_window
from virtualbatch.torch._certify.loop import certify_loop
from virtualbatch.torch._checks import check_call, refuse_foreign_accumulation
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._plan.memory import ERRORS, largest_parameters, left_bytes
from virtualbatch.torch._plan.plan import planned
from virtualbatch.torch._plan.sizes import kept_sizes, signature
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._rows import RowsBefore
from virtualbatch.torch._window import Program
from virtualbatch.window.stream import windows
from virtualbatch.window.terms import GivenWeight
from virtualbatch.window.window import Window, refuse_sorted_rows

__all__ = ["Window", "backward", "captured", "certify", "certify_loop", "plan", "windows"]

Trained: TypeAlias = torch.nn.Module | torch.Tensor


@overload
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: Literal[False] = False,
    check: bool = True,
) -> torch.Tensor: ...
@overload
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: Literal[False] = False,
    check: bool = True,
) -> tuple[torch.Tensor, Any]: ...
@overload
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: Literal[True],
    check: bool = True,
) -> tuple[torch.Tensor, WindowStats]: ...
@overload
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: Literal[True],
    check: bool = True,
) -> tuple[torch.Tensor, Any, WindowStats]: ...
@overload
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: bool = False,
    check: bool = True,
) -> Any: ...
@as_written
def backward(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: bool = False,
    check: bool = True,
) -> Any:
    """Does what `loss_fn(batch).backward()` does, on the memory of a micro-batch.

    Gradients are added to `.grad`, as PyTorch adds them. BatchNorm layers of the modules take one
    momentum update. If anything raises, every `.grad`, buffer, momentum and hook of the modules
    is as before the call. If memory runs out, the same window runs again with smaller
    micro-batches, from the same random state, and the smaller size is kept for the module.

    Args:
        loss_fn: batch -> scalar mean, or a dict of term names to scalar means whose sum is the
            loss. With `has_aux=True` it returns (loss, aux).
        batch: nested dicts, lists, tuples and dataclasses of tensors that share their leading
            axis, the rows; or a `Window`, and then no size is given. Tensors on the host are
            copied to the device of the modules, one micro-batch at a time.
        module: the module, or all modules, whose parameters and buffers the loss uses; tensors
            that are trained and that no module holds may be among them.
        microbatch_size: rows of one forward and backward; or "auto" or an `Auto`, which plan it
            at the first batch.
        accumulation_steps: micro-batches per window: `microbatch_size = ceil(rows / steps)`.
        weight: micro-batch -> what its mean was divided by, a scalar >= 0 (rows when None); for
            a dict of terms a dict with the same keys, None marking a term that does not depend
            on the rows and "sum" one that is a sum; or "sum" for a loss that is a sum. It gets
            the micro-batch where the batch is, before it is copied.
        has_aux: whether `loss_fn` returns something beside the loss. Leaves of aux with one entry
            per row come back concatenated in row order, other floating leaves averaged by rows,
            integers summed, all detached.
        backward_fn: scalar loss -> None, where gradients are to be computed by something else
            than `loss.backward()`, such as `lambda loss: scaler.scale(loss).backward()`.
        stats: whether the `WindowStats` of the window are returned too, from which
            `virtualbatch.NoiseScale` estimates the noise of its gradients.
        check: whether the first window of a loss proves itself: a few rows of it run in parts and
            together, which calls `loss_fn` some ten times more, once.

    Returns:
        The mean loss of the whole batch, a detached scalar of the loss's dtype and device; with
        `has_aux=True` (loss, aux); with `stats=True` (loss, stats) or (loss, aux, stats).

    Raises:
        ValueError: sizes are not positive integers or disagree, rows differ or are missing, a
            weight is negative or not finite, the loss is not a scalar or has no gradient, names
            of terms differ, there is no trainable parameter, another library accumulates too,
            the first rows show that gradients of micro-batches do not add up to their batch's, or
            the loss function changes `.grad`, shares a graph with another micro-batch, or has
            changed its rows when memory runs out.
        TypeError: the loss is not a floating tensor, or an argument is of the wrong kind.
        RuntimeError: a BatchNorm layer in training mode was not called as a module, or is inside
            another window.
        MemoryError: not even a micro-batch of one row fits.

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
    refuse_sorted_rows(batch, stats)
    found = inventory(module)
    refuse_foreign_accumulation()
    program = Program(loss_fn, weight, has_aux, backward_fn, found, stats)
    given: Any = microbatch_size
    rows = read(batch, weighted=weight is not None)
    memory = Memory(ERRORS, partial(left_bytes, found.accelerator))

    def run(cut: Sequence[Microbatch]) -> Any:
        shares = program.shares(cut)
        checked = prove_first_window(program, rows, cut, shares) if check else cut
        return program.run(checked, shares)

    if not rows.can_be_cut:
        return run_as_it_is(lambda: run(rows.given), memory)
    if is_automatic(given):
        size = _planned_size(program, rows, given)
        given = size.rows
        cut = rows.cut(given, None)
    else:
        cut = rows.cut(given, accumulation_steps)
        asked = given or most_rows(cut)
        size = kept_sizes(found.owner).asked(asked)
        if size.rows < asked:
            cut = rows.cut(given, accumulation_steps, size.rows)

    result = run_until_it_fits(
        run,
        cut,
        most_rows,
        lambda most: rows.cut(given, accumulation_steps, most),
        size,
        memory,
        partial(largest_parameters, found.roots[0]),
        put_back=RandomState(found.accelerator).restore,
        is_too_late=RowsBefore(rows).refuse_changed,
    )
    size.succeeded()
    return result


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
    loss needs values, from a window that is run. It is a straight line in the rows of a
    micro-batch, so about three windows tell every size. Then a few sizes are timed, by as many of
    their micro-batches as take a moment, for ten seconds at the most; the smallest within 2 % of
    the fastest is chosen.
    Parameters, `.grad`s, buffers and random states are as before the call.

    Args:
        loss_fn: as in `backward`, like all arguments that are not explained here.
        batch: a batch, not a Window.
        module: see there.
        weight: see there.
        has_aux: see there.
        backward_fn: see there.
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
    functions = {"loss_fn": loss_fn, "weight": weight, "backward_fn": backward_fn}
    check_call(functions, batch, "auto", None)
    found = inventory(module)
    refuse_foreign_accumulation()
    program = Program(loss_fn, weight, has_aux, backward_fn, found)
    return planned(program, read(batch), memory_limit)


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
        loss_fn: as in `backward`, like all arguments that are not explained here.
        batch: a batch, not a Window.
        module: see there.
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per window.
        weight: see there.
        has_aux: see there.

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
    check_call({"loss_fn": loss_fn, "weight": weight}, batch, microbatch_size, accumulation_steps)
    found = inventory(module)
    refuse_foreign_accumulation()
    check_cut(batch, microbatch_size, accumulation_steps)
    program = Program(loss_fn, weight, has_aux, None, found)
    return certificate(program, batch, microbatch_size, accumulation_steps)


def _planned_size(program: Program, batch: ReadBatch, automatic: Any) -> CurrentSize:
    sizes = automatic if isinstance(automatic, Auto) else kept_sizes(program.found.owner)
    return sizes.planned(
        signature(program, batch.whole), lambda: planned(program, batch, sizes.memory_limit)
    )
