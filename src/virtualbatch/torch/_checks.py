"""What is refused before anything of a window is computed."""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from virtualbatch.split import Window, check_sizes


def check_call(
    functions: dict[str, Any], batch: Any, microbatch_size: Any, accumulation_steps: Any
) -> None:
    """Refuses arguments of the wrong kind and sizes that no batch could satisfy.

    Args:
        functions: argument name -> function, or None where the argument may be left out.
        batch: a batch or a Window.
        microbatch_size: as given.
        accumulation_steps: as given.

    Raises:
        TypeError: an argument is not a function.
        ValueError: a size is not a positive integer, is missing, or comes with a Window; or
            PyTorch records no gradients here.
    """
    for name, function in functions.items():
        if not callable(function) and not (name != "loss_fn" and function is None):
            of_what = "loss" if name == "backward_fn" else "batch"
            raise TypeError(
                f"{name} must be a function of one {of_what}. Got {name}={function!r}. "
                f"Pass {name}=lambda {of_what}: ..."
            )
    if not isinstance(batch, Window):
        check_sizes(microbatch_size, accumulation_steps)
    elif microbatch_size is not None or accumulation_steps is not None:
        raise ValueError(
            "A Window is already cut. "
            f"Got microbatch_size={microbatch_size} and accumulation_steps={accumulation_steps} "
            "with a Window. Leave both out."
        )
    if not torch.is_grad_enabled():
        raise ValueError(
            "backward must be called where PyTorch records gradients. Got a call under "
            "torch.no_grad() or torch.inference_mode(). Call it outside."
        )


def checked_layers(module: Any) -> list[torch.nn.Module]:
    """All modules of a window, submodules included, each once.

    Args:
        module: one module or an iterable of them.

    Raises:
        TypeError: something is not a module.
        NotImplementedError: a module is a DistributedDataParallel.
        ValueError: a module is not initialised yet.
    """
    one = isinstance(module, torch.nn.Module)
    roots = [module] if one or not isinstance(module, Iterable) else list(module)
    layers: dict[torch.nn.Module, None] = {}
    for root in roots:
        if not isinstance(root, torch.nn.Module):
            raise TypeError(
                "module must be a torch.nn.Module or an iterable of them. "
                f"Got {type(root).__name__}. Pass the model whose parameters the loss uses."
            )
        _collect(root, layers)
    for layer in layers:
        if isinstance(layer, torch.nn.parallel.DistributedDataParallel):
            raise NotImplementedError(
                "DistributedDataParallel is not supported by this version, which sums no weights "
                "over replicas. Got module of type DistributedDataParallel. "
                "Train on one device, or accumulate without virtualbatch."
            )
        for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
            if torch.nn.parameter.is_lazy(tensor):
                raise ValueError(
                    "module must be initialised. "
                    f"Got {name} without a shape in {type(layer).__name__}. "
                    "Run its forward once on a small input."
                )
    return list(layers)


def _collect(layer: torch.nn.Module, layers: dict[torch.nn.Module, None]) -> None:
    # `Module.modules()` builds a name for each, which costs more than the rest of a small window.
    if layer not in layers:
        layers[layer] = None
        for child in layer._modules.values():
            if child is not None:
                _collect(child, layers)


def trainable_parameters(layers: Sequence[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The parameters that take a gradient, each once.

    Raises:
        ValueError: there is none, or one has a hook that could step an optimizer in the middle of
            the window.
    """
    owned = {
        parameter: (layer, name)
        for layer in layers
        for name, parameter in layer._parameters.items()
        if parameter is not None and parameter.requires_grad
    }
    if not owned:
        names = ", ".join(type(layer).__name__ for layer in layers) or "no module"
        raise ValueError(
            "module must have at least one trainable parameter. "
            f"Got {names} without any. Pass the model that the loss uses, not frozen."
        )
    for parameter, (layer, name) in owned.items():
        if parameter._post_accumulate_grad_hooks:
            raise ValueError(
                "A parameter must have no post-accumulate-grad hook, which runs at every "
                "micro-batch and may step an optimizer in the middle of the window. "
                f"Got one on {name} of {type(layer).__name__}. "
                "Remove it, and do its work after the call."
            )
    return list(owned)


def refuse_foreign_accumulation(layers: Sequence[torch.nn.Module]) -> None:
    """Refuses to run inside a loop that accumulates as well, where that can be known.

    Raises:
        ValueError: Accelerate or a Lightning trainer divides by micro-batches of its own.
    """
    # Looked up, never imported: whoever does not use Accelerate does not pay for it.
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    shared = getattr(state, "_shared_state", None) or {}
    steps = (shared.get("plugin_kwargs") or {}).get("num_steps")
    if _is_several(steps):
        raise ValueError(
            "Accelerate must leave accumulation to virtualbatch. "
            f"Got gradient_accumulation_steps={steps} in its GradientState. "
            "Make the Accelerator with gradient_accumulation_steps=1."
        )
    for layer in layers:
        steps = getattr(vars(layer).get("_trainer"), "accumulate_grad_batches", None)
        if _is_several(steps):
            raise ValueError(
                "Lightning must leave accumulation to virtualbatch. "
                f"Got a trainer with accumulate_grad_batches={steps}. "
                "Make the Trainer with accumulate_grad_batches=1 and give it whole batches."
            )


def _is_several(steps: Any) -> bool:
    return isinstance(steps, int) and steps > 1
