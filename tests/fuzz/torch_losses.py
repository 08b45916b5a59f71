"""Loss functions that only PyTorch's user can write. Frames of this file are the user's."""

from typing import Any

import torch
from tests.fuzz.call import Call
from tests.fuzz.losses import found

import virtualbatch.torch as vb


def _scalar(result: Any) -> Any:
    """The loss without aux, of terms their sum."""
    result = result[0] if type(result) is tuple else result
    return sum(result.values()) if isinstance(result, dict) else result


def _backward(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    _scalar(result).backward(retain_graph=True)
    return result


def _backward_apart(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    other = torch.ones(2, requires_grad=True)
    other.sum().backward()
    return result


def _another_pass(call: Call, before: Any, batch: Any) -> Any:
    before(batch)
    _scalar(before(batch)).backward()
    return before(batch)


def _nested_window(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    vb.backward(lambda given: _scalar(before(given)), batch, module=call.weights, microbatch_size=1)
    return result


def _nested_loss(call: Call, before: Any, batch: Any) -> Any:
    return vb.loss(
        lambda given: _scalar(before(given)), batch, module=call.weights, microbatch_size=1
    )


def _unrecorded(call: Call, before: Any, batch: Any) -> Any:
    with torch.no_grad():
        return before(batch)


def _turned_off(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    torch.set_grad_enabled(False)
    return result


def _cleared(call: Call, before: Any, batch: Any) -> Any:
    call.weights.zero_grad()
    return before(batch)


def _frozen(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    call.weights.requires_grad_(False)
    return result


def _in_place(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    next(iter(found(batch))).mul_(2)
    return result


def _steps(call: Call, before: Any, batch: Any) -> Any:
    result = before(batch)
    with torch.no_grad():
        call.weights.weight.add_(1)
    return result


def _inference(call: Call, before: Any, batch: Any) -> Any:
    with torch.inference_mode():
        return before(batch)


# name -> (call, the loss function before, micro-batch) -> what it returns instead.
LOSSES: dict[str, Any] = {
    "calls backward": _backward,
    "calls backward of something else": _backward_apart,
    "calls backward of its own pass": _another_pass,
    "a window in the window": _nested_window,
    "a loss in the window": _nested_loss,
    "records nothing": _unrecorded,
    "turns recording off": _turned_off,
    "clears gradients": _cleared,
    "freezes": _frozen,
    "changes rows in place": _in_place,
    "steps": _steps,
    "under inference": _inference,
    "detached": lambda call, before, batch: _scalar(before(batch)).detach(),
    "sparse": lambda call, before, batch: _scalar(before(batch))[None].to_sparse(),
    "on no device": lambda call, before, batch: _scalar(before(batch)).to("meta"),
}
# What these leave behind is the user's own doing, on the whole batch too.
LEAVES_TRACES = (
    "clears gradients",
    "freezes",
    "steps",
    "calls backward",
    "calls backward of its own pass",
    "a window in the window",
    "a loss in the window",
)
