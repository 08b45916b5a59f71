"""The contents of a window's modules, found in one walk, and the checks of these modules."""

from typing import Any, NamedTuple

import torch
from torch.nn.parameter import is_lazy

from virtualbatch.torch._distributed import distributed_classes, put_to_rest
from virtualbatch.torch._loose import Loose, as_modules
from virtualbatch.torch._stepping import refuse_node_hooks


class Inventory(NamedTuple):
    """What a window needs from its modules and their submodules.

    Fields:
        roots: the modules themselves, each once.
        layers: the modules and all their submodules, each once.
        parameters: the parameters that take a gradient, each once.
        with_buffers: modules that have buffers of their own, each once.
        accelerator: the device that all parameters are on; None if they are on the host or on
            several devices.
        devices: all devices of parameters and buffers, without the host.
        owner: the first module or tensor that was given. It lives as long as the training.
        distributed: modules that add up gradients, or gather parameters, over processes.
    """

    roots: list[torch.nn.Module]
    layers: list[torch.nn.Module]
    parameters: list[torch.nn.Parameter]
    with_buffers: list[torch.nn.Module]
    accelerator: torch.device | None
    devices: list[torch.device]
    owner: torch.nn.Module | torch.Tensor
    distributed: list[torch.nn.Module]


def inventory(module: Any, *, hands_over: bool = False, may_be_frozen: bool = False) -> Inventory:
    """Walks through modules and all their submodules.

    Args:
        module: one module or an iterable of modules. Trained tensors may be among them.
        hands_over: whether other code calls backward after the window. Hooks of parameters are
            then not called inside the window.
        may_be_frozen: whether it is allowed that no parameter is trainable.

    Raises:
        TypeError: something is neither a module nor a tensor.
        ValueError: no parameter is trainable, a tensor takes no gradient, a parameter has a hook
            that could step an optimizer in the middle of the window, a module is not initialised
            yet, or a Lightning trainer accumulates or calls backward itself.
    """
    roots = _roots(module)
    layers = list(roots.values())
    seen = set(roots)
    parameters: dict[int, torch.nn.Parameter] = {}
    with_buffers = []
    devices = set()
    classes = distributed_classes()
    distributed = []
    # The list grows while it is walked. `Module.modules()` would build a name for each layer.
    for layer in layers:
        if isinstance(layer, classes):
            put_to_rest(layer)
            distributed.append(layer)
        _check_layer(layer, hands_over)
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            # Nearly all have this class, and to compare the class is faster than a call.
            if type(parameter) is not torch.nn.Parameter:
                _check_initialised(layer, name, parameter)
            devices.add("cpu" if parameter.is_cpu else parameter.device)
            if parameter.requires_grad:
                if parameter._post_accumulate_grad_hooks and not hands_over:
                    raise ValueError(_stepping(layer, name))
                parameters[id(parameter)] = parameter
        if layer._buffers:
            with_buffers.append(layer)
        for child in layer._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                layers.append(child)
    if not roots or (not parameters and not may_be_frozen):
        names = ", ".join(type(root).__name__ for root in roots.values()) or "no module"
        raise ValueError(
            f"module must have at least one trainable parameter. Got {names} without any. Pass "
            "the model that the loss uses, and leave some of its parameters trainable."
        )
    apart = [device for device in devices if device != "cpu"]
    accelerator = apart[0] if len(devices) == 1 and apart else None
    of_buffers = {x.device for y in with_buffers for x in y._buffers.values() if x is not None}
    apart += [device for device in of_buffers if device.type != "cpu" and device not in devices]
    first = next(iter(roots.values()))
    owner = first.tensor if isinstance(first, Loose) else first
    trained = list(parameters.values())
    if not hands_over:
        refuse_node_hooks(owner, trained)
    return Inventory(
        list(roots.values()),
        layers,
        trained,
        with_buffers,
        accelerator,
        apart,
        owner,
        distributed,
    )


def _roots(module: Any) -> dict[int, torch.nn.Module]:
    """The modules that were given, by identity."""
    roots = list(as_modules(module))
    for root in roots:
        if not isinstance(root, torch.nn.Module):
            raise TypeError(
                "module must be a torch.nn.Module or an iterable of them. "
                f"Got {type(root).__name__}. Pass the model whose parameters the loss uses."
            )
    return {id(root): root for root in roots}


def _check_layer(layer: torch.nn.Module, hands_over: bool) -> None:
    for name, buffer in layer._buffers.items():
        _check_initialised(layer, name, buffer)
    # A LightningModule keeps its trainer here. Its property `trainer` raises if there is none.
    trainer = vars(layer).get("_trainer")
    if trainer is None:
        return
    steps = getattr(trainer, "accumulate_grad_batches", None)
    if isinstance(steps, int) and steps > 1:
        raise ValueError(
            "Lightning must leave accumulation to virtualbatch. "
            f"Got a trainer with accumulate_grad_batches={steps}. "
            "Make the Trainer with accumulate_grad_batches=1 and give it whole batches."
        )
    if hands_over:
        return
    # After `fit` the module still has its trainer, and any other loop may train it.
    if vars(layer).get("_automatic_optimization") and getattr(trainer, "training", False):
        raise ValueError(
            "Lightning must leave the backward pass to virtualbatch. "
            "Got a LightningModule with automatic optimization, which calls backward and steps "
            "the optimizer itself. Return virtualbatch.torch.loss(...) from training_step. Or set "
            "self.automatic_optimization = False in its __init__, and call zero_grad and step of "
            "self.optimizers() in training_step."
        )


def _stepping(layer: torch.nn.Module, name: str) -> str:
    return (
        "A parameter must have no post-accumulate-grad hook, which runs at every "
        "micro-batch and may step an optimizer in the middle of the window. "
        f"Got one on {name} of {type(layer).__name__}. "
        "Remove it, and do its work after the call."
    )


def _check_initialised(layer: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
    if is_lazy(tensor):
        raise ValueError(
            "module must be initialised. "
            f"Got {name} without a shape in {type(layer).__name__}. "
            "Run its forward once on a small input."
        )
