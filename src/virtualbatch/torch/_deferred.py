"""`loss`: a window behind one autograd node, for code that calls backward on a loss itself."""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto
from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._call import Call, Trained
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._conclusion import Ran
from virtualbatch.torch._handover import Finished, hooks_set_aside
from virtualbatch.torch._modules import Inventory, inventory
from virtualbatch.torch._replicas.found import replicas_of
from virtualbatch.torch._replicas.replicas import Replicas
from virtualbatch.torch._undo import undone_if_cut
from virtualbatch.torch._window import Program
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import AuxLossFn, GivenWeight, LossFn


class _Options(TypedDict, total=False):
    """The arguments of `loss` that do not change the form of its result."""

    microbatch_size: int | Literal["auto"] | Auto | None
    accumulation_steps: int | None
    weight: GivenWeight
    check: bool
    scaler: Any
    group: Any
    reduce: Literal["window", "microbatch"] | None
    accumulator_dtype: Literal["bfloat16", "float32"] | None


@overload
def loss(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> torch.Tensor: ...
@overload
def loss(
    loss_fn: AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[True],
    stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Any]: ...
@overload
def loss(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, WindowStats]: ...
@overload
def loss(
    loss_fn: AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[True],
    stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[torch.Tensor, Any, WindowStats]: ...
@overload
def loss(
    loss_fn: LossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    has_aux: Literal[False] = False,
    stats: bool,
    **options: Unpack[_Options],
) -> Any: ...
@overload
def loss(
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
def loss(
    loss_fn: LossFn | AuxLossFn,
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: Literal["window", "microbatch"] | None = None,
    accumulator_dtype: Literal["bfloat16", "float32"] | None = None,
) -> Any:
    """The loss of a whole batch, with the memory of a micro-batch, to call `backward()` on.

    Use it where something else calls backward, such as `accelerator.backward(loss)`,
    `scaler.scale(loss).backward()` or a trainer.

    The whole window runs when `loss` is called, and the gradients are computed then. The result is
    a scalar with one autograd node. A backward pass through it hands the finished gradients over
    without a copy, multiplied by the gradient that arrives at the node. So a hook of a parameter
    runs once, and an optimizer inside the backward pass steps once. Dropping the loss frees the
    gradients. BatchNorm layers, errors and memory that runs out are handled as in `backward`.

    Under `torch.no_grad()` the result is only the mean loss of the batch. A module of one process
    evaluates its own batch. A module that adds up gradients evaluates the rows of all ranks.

    Args:
        loss_fn: a function of a batch. It returns a scalar mean, or a dict from names of terms to
            scalar means whose sum is the loss. With `has_aux=True` it returns `(loss, aux)`.
        batch: the whole batch: nested dicts, lists, tuples and dataclasses of tensors whose
            first axis is the rows. Or a `Window`, which is already cut.
        module: the module, or all modules, whose parameters and buffers the loss uses. Trained
            tensors that no module holds may be listed too.
        microbatch_size: the rows of one forward and backward. `"auto"` or an `Auto` plans the size
            at the first batch. Leave it out for a `Window`.
        accumulation_steps: the micro-batches per window, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        weight: what the mean of a micro-batch was divided by: None for its rows, `"sum"` for a
            loss that is a sum, or a function of a micro-batch. See `backward`.
        has_aux: whether `loss_fn` returns `(loss, aux)`. See `backward` for how aux is merged.
        stats: whether to return the `WindowStats` too. With several ranks use `backward` for them,
            because here the gradients are added up later.
        check: whether the first window of a loss is checked on a few of its rows. This calls
            `loss_fn` about ten times more, once.
        scaler: the `torch.amp.GradScaler` that scales the loss afterwards. Micro-batches then run
            at its scale, so that gradients of float16 do not underflow inside the window.
        group: the ranks whose gradients the module adds up, as a process group or a mesh. Pass it
            where the module does not show them. Pass False where each rank trains its own module.
        reduce: when ranks add their gradients up: `"window"`, or with `fully_shard` also
            `"microbatch"`, which is the default there. `"overlapped"` is refused.
        accumulator_dtype: `"bfloat16"` sums the gradients of bfloat16 parameters in bfloat16, with
            stochastic rounding. The gradient that arrives at the node multiplies the rounded
            sums. None or `"float32"` sums in float32 or wider.

    Returns:
        The mean loss of the whole batch, a scalar with the dtype and device of the loss. With
        several ranks it is the loss of all ranks together. With `has_aux=True` the result is
        `(loss, aux)`. With `stats=True` it is `(loss, stats)` or `(loss, aux, stats)`.

    Raises:
        ValueError: an argument is wrong as in `backward`, or `reduce` is `"overlapped"`.
        ValueError: `stats=True` is given with several ranks.
        TypeError: the loss is not a floating tensor, an argument has the wrong type, or `scaler`
            is not a scaler.
        RuntimeError: the result is differentiated a second time, or a BatchNorm layer is called as
            in `backward`.
        MemoryError: not even a micro-batch of one row fits.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 1.0)
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = loss(lambda x: model(x).mean(), rows, module=model, microbatch_size=2)
        >>> found.backward()
        >>> print(f"{found:.3f}", model.weight.grad.numpy().round(3))
        1.333 [[0.667 0.667]]
    """
    check_flags(has_aux=has_aux, stats=stats, check=check)
    found = inventory(module, hands_over=True, may_be_frozen=not torch.is_grad_enabled())
    seed = rounding_seed(accumulator_dtype, found)
    program = Program(loss_fn, weight, has_aux, None, found, stats, rounding_seed=seed)
    call = Call(program, batch, microbatch_size, accumulation_steps, check)
    return window_loss(call, scaler, group, reduce)


@undone_if_cut
def window_loss(
    call: Call, scaler: Any = None, group: Any = None, reduce: str | None = None
) -> Any:
    """The result of `loss` for a call whose arguments are already checked.

    Args:
        call: a call without a `backward_fn`, whose modules may hand gradients over.
        scaler: as in `loss`.
        group: as in `loss`.
        reduce: as in `loss`.
    """
    recording = torch.is_grad_enabled()
    found = call.program.found
    replicas = replicas_of(found, group, reduce)
    _check(call.program.stats, replicas, reduce, recording)
    scale = None
    if recording:
        scale, backward_fn = _scaled(scaler, found)
        call = call._replace(program=call.program._replace(backward_fn=backward_fn))
    if replicas is not None:
        ran, outcome = call.together(replicas)
        ran.loop.statistics.commit(outcome.statistics)
        value = outcome.loss
        if recording:
            value = replicas.finished(ran, outcome.reached, scale).behind(value)
        return ran.result(value)
    if not recording:
        return call.alone(_evaluate)
    with hooks_set_aside(found.owner, found.parameters):
        return call.alone(partial(_hand_over, scale))


def _hand_over(scale: torch.Tensor | None, ran: Ran) -> Any:
    """Puts the gradients of a window behind its loss."""
    value, stats = ran.loss.mean(), ran.stats()
    commit = Commit()
    ran.loop.statistics.prepare(commit)
    pairs = list(zip(ran.gradients.parameters, ran.gradients.taken(), strict=True))
    reached = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
    del pairs
    finished = Finished([p for p, _ in reached], [g for _, g in reached], scale)
    # A loss function may have turned gradients off and not on again, after it built its graph.
    with torch.enable_grad():
        result = ran.result(finished.behind(value), stats)
    commit.run(ran.undo)
    return result


def _evaluate(ran: Ran) -> Any:
    """The mean loss of a batch. BatchNorm layers in training mode get their update."""
    commit = Commit()
    ran.loop.statistics.prepare(commit)
    result = ran.result(ran.loss.mean())
    commit.run(ran.undo)
    return result


def _check(stats: bool, replicas: Replicas | None, reduce: str | None, recording: bool) -> None:
    if stats and not recording:
        raise ValueError(
            "stats=True needs gradients, whose noise it measures. Got it where PyTorch records "
            "none. Leave stats out, or call it outside torch.no_grad()."
        )
    if stats and replicas is not None:
        raise ValueError(
            "Statistics over ranks need the gradients of all ranks. Got stats=True in loss, "
            "which runs before that. Use backward(..., stats=True)."
        )
    if reduce == "overlapped":
        raise ValueError(
            'reduce="overlapped" adds gradients up in the last backward pass of a window. '
            "Got it in loss, whose gradients meet later. Leave it out, or use backward."
        )


def _scaled(scaler: Any, found: Inventory) -> tuple[torch.Tensor | None, Any]:
    """The scale of a scaler, and the backward pass that starts from it."""
    if scaler is None:
        return None, None
    if not callable(getattr(scaler, "scale", None)):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler. Got {type(scaler).__name__}. "
            "Pass the one that scales the loss afterwards."
        )
    one = torch.ones((), device=found.accelerator or torch.device("cpu"))
    return scaler.scale(one).detach(), lambda loss: scaler.scale(loss).backward()
