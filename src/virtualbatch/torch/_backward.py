"""`backward`: the gradient of a whole batch, added to `.grad` a micro-batch at a time."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto
from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._call import Call, Trained
from virtualbatch.torch._checks import check_recording
from virtualbatch.torch._conclusion import keep
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._replicas.found import replicas_of
from virtualbatch.torch._undo import undone_if_cut
from virtualbatch.torch._window import Program
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import AuxLossFn, GivenWeight, LossFn


class _Options(TypedDict, total=False):
    """The arguments of `backward` that do not change the form of its result."""

    microbatch_size: int | Literal["auto"] | Auto | None
    accumulation_steps: int | None
    weight: GivenWeight
    backward_fn: Callable[[torch.Tensor], Any] | None
    check: bool
    group: Any
    reduce: Literal["window", "overlapped", "microbatch"] | None
    accumulator_dtype: Literal["bfloat16", "float32"] | None


@overload
def backward(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...
@overload
def backward(
    loss_fn: AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[True],
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Any]: ...
@overload
def backward(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, WindowStats]: ...
@overload
def backward(
    loss_fn: AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[True],
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Any, WindowStats]: ...
@overload
def backward(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: bool,
    **options: Unpack[_Options],
) -> Any: ...
@overload
def backward(
    loss_fn: AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[True],
    stats: bool,
    **options: Unpack[_Options],
) -> Any: ...
@as_written
@undone_if_cut
def backward(
    loss_fn: LossFn | AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    backward_fn: Callable[[torch.Tensor], Any] | None = None,
    stats: bool = False,
    check: bool = True,
    group: Any = None,
    reduce: Literal["window", "overlapped", "microbatch"] | None = None,
    accumulator_dtype: Literal["bfloat16", "float32"] | None = None,
) -> Any:
    """Does what `loss_fn(batch).backward()` does, with the memory of a micro-batch.

    The batch runs in micro-batches. Their gradients add up to the gradient of the whole batch, and
    the sum is added to `.grad` as PyTorch adds it. Each BatchNorm layer of the modules makes one
    momentum update.

    If anything raises, every `.grad`, buffer, momentum and hook of the modules is as before the
    call. If memory runs out, the same window runs again with smaller micro-batches and the same
    random numbers. The smaller size is kept for the module.

    Args:
        loss_fn: a function of a batch. It returns a scalar mean, or a dict from names of terms to
            scalar means whose sum is the loss. With `has_aux=True` it returns `(loss, aux)`.
        batch: the whole batch: nested dicts, lists, tuples and dataclasses of tensors whose
            first axis is the rows. Tensors on the host are copied to the device of the modules,
            one micro-batch at a time. Or a `Window`, which is already cut.
        module: the module, or all modules, whose parameters and buffers the loss uses. Trained
            tensors that no module holds may be listed too.
        microbatch_size: the rows of one forward and backward. `"auto"` or an `Auto` plans the size
            at the first batch. Leave it out for a `Window`.
        accumulation_steps: the micro-batches per window, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        weight: what the mean of a micro-batch was divided by. None means its rows. `"sum"` means
            that the loss is a sum. Otherwise a function of a micro-batch that returns a number
            `>= 0`. For a loss of several terms it returns a dict with the same names, with None
            for a term that does not depend on the rows and `"sum"` for a term that is a sum. The
            function gets the micro-batch before it is copied to the device.
        has_aux: whether `loss_fn` returns `(loss, aux)`. Tensors of aux with one entry per row
            come back concatenated in the order of the rows. Other floating tensors are averaged by
            rows. Integers are summed, in at least 32 bits. All of them are detached.
        backward_fn: a function of the scalar loss that computes the gradients, where
            `loss.backward()` is not enough, such as
            `lambda loss: scaler.scale(loss).backward()`.
        stats: whether to return the `WindowStats` too, from which `virtualbatch.NoiseScale`
            estimates the noise of the gradients.
        check: whether the first window of a loss is checked: a few of its rows run in parts and
            together, and both gradients must agree. This calls `loss_fn` about ten times more,
            once.
        group: the ranks whose gradients the module adds up, as a process group or a mesh. Pass it
            where the module does not show them. Pass False where each rank trains its own module.
        reduce: when ranks add their gradients up. With DistributedDataParallel: `"window"` (the
            default), after the last micro-batch, or `"overlapped"`, during its backward pass. With
            `fully_shard`: `"microbatch"` (the default), after each micro-batch, or `"window"`.
        accumulator_dtype: `"bfloat16"` sums the gradients of bfloat16 parameters in bfloat16, with
            stochastic rounding. It takes half the memory of float32 and adds the error that
            docs/guides/torch_precision.md states. Other parameters are not affected. None or
            `"float32"` sums in float32, or in the dtype of the parameter where that is wider.

    Returns:
        The mean loss of the whole batch, a detached scalar with the dtype and device of the loss.
        With several ranks it is the loss of all ranks together. With `has_aux=True` the result is
        `(loss, aux)`, where aux is that of the rows of this rank. With `stats=True` it is
        `(loss, stats)` or `(loss, aux, stats)`.

    Raises:
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: tensors have different numbers of rows, or the batch has none.
        ValueError: a weight is negative or not finite, or its terms are not those of the loss.
        ValueError: the loss is not a scalar or has no gradient.
        ValueError: no parameter is trainable, or none has the dtype for `accumulator_dtype`.
        ValueError: another library accumulates gradients too.
        ValueError: the first rows show that the gradients of micro-batches do not add up.
        ValueError: the loss function changes `.grad`, shares a graph with another micro-batch, or
            had changed its rows when memory ran out.
        TypeError: the loss is not a floating tensor, or an argument has the wrong type.
        RuntimeError: a BatchNorm layer in training mode was not called as a module, or it is
            inside another window.
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
    # The statistics are written last, because a graph that is not yet differentiated may hold
    # their buffers.
    ran.loop.statistics.commit(outcome.statistics)
    return ran.result(handed_over.detach(), outcome.stats(ran))
