"""`loss`: a window behind one autograd node, for whatever calls backward on a loss."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, overload

import torch

from virtualbatch.noise.estimate import WindowStats
from virtualbatch.plan.auto import Auto
from virtualbatch.torch._accumulator import rounding_seed
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._call import Call, Trained
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._handover import Finished, hooks_set_aside
from virtualbatch.torch._modules import Inventory, inventory
from virtualbatch.torch._replicas.found import replicas_of
from virtualbatch.torch._replicas.replicas import Replicas
from virtualbatch.torch._undo import undone_if_cut
from virtualbatch.torch._window import Program, Ran
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import GivenWeight


@overload
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    stats: Literal[False] = False,
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> torch.Tensor: ...
@overload
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    stats: Literal[False] = False,
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> tuple[torch.Tensor, Any]: ...
@overload
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[False] = False,
    stats: Literal[True],
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> tuple[torch.Tensor, WindowStats]: ...
@overload
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: Literal[True],
    stats: Literal[True],
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> tuple[torch.Tensor, Any, WindowStats]: ...
@overload
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> Any: ...
@as_written
@undone_if_cut
def loss(
    loss_fn: Callable[[Any], Any],
    batch: Any,
    *,
    module: Trained | Iterable[Trained],
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    weight: GivenWeight = None,
    has_aux: bool = False,
    stats: bool = False,
    check: bool = True,
    scaler: Any = None,
    group: Any = None,
    reduce: str | None = None,
    accumulator_dtype: str | None = None,
) -> Any:
    """The loss of a whole batch, on the memory of a micro-batch; call backward on it as ever.

    The window runs when this is called. What comes back is a scalar with one node behind it: a
    backward pass through it, by whoever makes it, hands the finished gradients over without a copy,
    multiplied by what arrives there. So hooks of parameters hear one gradient, an optimizer in the
    backward pass steps once, and a trainer keeps its own line, such as
    `accelerator.backward(loss)` or `scaler.scale(loss).backward()`. Dropping the loss frees the
    gradients. What BatchNorm layers and failures leave is as in `backward`.

    Where PyTorch records no gradients, as under `torch.no_grad()`, it is the mean loss of the batch
    and nothing more; then a module alone evaluates on its own, and one that adds gradients up
    evaluates the rows of all ranks.

    Args:
        loss_fn: as in `backward`, like all arguments that are not explained here.
        batch: see there.
        module: see there.
        microbatch_size: see there.
        accumulation_steps: see there.
        weight: see there.
        has_aux: see there.
        stats: see there; over ranks they need `backward`, because gradients meet later here.
        check: see there.
        scaler: the `torch.amp.GradScaler` that the loss is scaled by afterwards. Micro-batches run
            at its scale, so that no gradient of float16 underflows inside.
        group: see there.
        reduce: see there; not "overlapped", because gradients meet later.
        accumulator_dtype: see there. What arrives in the backward pass multiplies the rounded sums.

    Returns:
        The mean loss of the whole batch, on all ranks, a scalar of the loss's dtype and device;
        with `has_aux=True` (loss, aux); with `stats=True` (loss, stats) or (loss, aux, stats).

    Raises:
        ValueError: see `backward`; or statistics are asked for that are not known yet.
        TypeError: see there; or the scaler is none.
        RuntimeError: see there. A second backward pass raises one, too.
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
    """What `loss` returns, of a call that is put together already.

    Args:
        call: without a `backward_fn`; its modules may hand gradients over.
        scaler: see `loss`, like all that follow.
        group: see there.
        reduce: see there.
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
        ran.run.statistics.commit(outcome.statistics)
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
    ran.run.statistics.prepare(commit)
    pairs = list(zip(ran.gradients.parameters, ran.gradients.taken(), strict=True))
    reached = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
    del pairs
    finished = Finished([p for p, _ in reached], [g for _, g in reached], scale)
    # A loss function may have turned it off for good, and its loss would still have a graph.
    with torch.enable_grad():
        result = ran.result(finished.behind(value), stats)
    commit.run(ran.undo)
    return result


def _evaluate(ran: Ran) -> Any:
    """The mean loss of a batch; BatchNorm layers in training mode get their update."""
    commit = Commit()
    ran.run.statistics.prepare(commit)
    result = ran.result(ran.loss.mean())
    commit.run(ran.undo)
    return result


def _check(stats: bool, replicas: Replicas | None, reduce: str | None, recording: bool) -> None:
    if stats and not recording:
        raise ValueError(
            "Noise statistics are those of gradients. Got stats=True where PyTorch records none. "
            "Leave stats out, or call it outside torch.no_grad()."
        )
    if stats and replicas is not None:
        raise ValueError(
            "Statistics over ranks are known when gradients have met. Got stats=True in loss, "
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
