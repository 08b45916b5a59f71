"""`backward`: the gradient of a whole batch, added to `.grad` a micro-batch at a time."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto
from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._call import Call, Trained
from virtualbatch.torch._checks import check_recording
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._replicas.found import replicas_of
from virtualbatch.torch._undo import undone_if_cut
from virtualbatch.torch._window import Program, keep
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import GivenWeight


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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> Any: ...
@as_written
@undone_if_cut
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
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
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
            integers summed, in at least 32 bits, all detached.
        backward_fn: scalar loss -> None, where gradients are to be computed by something else
            than `loss.backward()`, such as `lambda loss: scaler.scale(loss).backward()`.
        stats: whether the `WindowStats` of the window are returned too, from which
            `virtualbatch.NoiseScale` estimates the noise of its gradients.
        check: whether the first window of a loss proves itself: a few rows of it run in parts and
            together, which calls `loss_fn` some ten times more, once.
        group: ranks whose gradients the module adds up, a process group or a mesh, where the
            module does not tell; False where ranks train apart, each with a module of its own.
        reduce: when ranks add gradients up: "window", after the last micro-batch, or "overlapped",
            during its backward pass, with a DistributedDataParallel; "microbatch" or "window"
            with `fully_shard`. None for the first of each pair.
        accumulator_dtype: "bfloat16" sums gradients of bfloat16 parameters in bfloat16, with
            stochastic rounding, in half the memory, with an error that docs/guides/torch.md states;
            others are summed as ever. None or "float32" for promote(parameter dtype, float32).

    Returns:
        The mean loss of the whole batch, that of all ranks together, a detached scalar of the
        loss's dtype and device; with `has_aux=True` (loss, aux), the aux of this rank's rows; with
        `stats=True` (loss, stats) or (loss, aux, stats).

    Raises:
        ValueError: sizes are not positive integers or disagree, rows differ or are missing, a
            weight is negative or not finite, the loss is not a scalar or has no gradient, names
            of terms differ, there is no trainable parameter, or none that `accumulator_dtype` is
            for, another library accumulates too,
            the first rows show that gradients of micro-batches do not add up to their batch's, or
            the loss function changes `.grad`, shares a graph with another micro-batch, or has
            changed its rows when memory runs out.
        TypeError: the loss is not a floating tensor, or an argument is of the wrong kind.
        RuntimeError: a BatchNorm layer in training mode was not called as a module, or is inside
            another window.
        MemoryError: not even a micro-batch of one row fits.

    Source:
        The law in docs/how_it_works/law.md.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> loss = backward(lambda x: model(x).mean(), rows, module=model, microbatch_size=2)
        >>> print(f"{loss:.3f}", model.weight.grad.numpy().round(3))
        1.333 [[0.667 0.667]]
    """
    check_flags(has_aux=has_aux, stats=stats, check=check)
    check_recording()
    found = inventory(module)
    replicas = replicas_of(found, group, reduce)
    seed = rounding_seed(accumulator_dtype, found)
    program = Program(loss_fn, weight, has_aux, backward_fn, found, stats, rounding_seed=seed)
    call = Call(program, batch, microbatch_size, accumulation_steps, check)
    if replicas is None:
        return call.alone(keep)
    if replicas.overlaps and (stats or backward_fn is not None):
        raise ValueError(
            'reduce="overlapped" leaves the last micro-batch to the reduction. Got it with '
            f'{"stats" if stats else "backward_fn"}, which must see it. Use reduce="window".'
        )
    ran, outcome = call.together(replicas)
    handed_over = replicas.finished(ran, outcome.reached, None).behind(outcome.loss)
    ran.gradients.add_held(handed_over)
    # Not before: a graph that is still to be differentiated may hold them.
    ran.run.statistics.commit(outcome.statistics)
    return ran.result(handed_over.detach(), outcome.stats(ran))
