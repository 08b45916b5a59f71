"""Checks that refuse a call before any part of its window is computed."""

import sys
from typing import Any

import torch

from virtualbatch.plan.auto import check_cut_or_auto
from virtualbatch.window.terms import is_sum


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
        ValueError: a size is not a positive integer, is missing, or comes with a Window.
    """
    for name, function in functions.items():
        may_be_other = function is None or (name == "weight" and is_sum(function))
        if not callable(function) and not (name != "loss_fn" and may_be_other):
            of_what = "loss" if name == "backward_fn" else "batch"
            raise TypeError(
                f"{name} must be a function of one {of_what}. Got {name}={function!r}. "
                f"Pass {name}=lambda {of_what}: ..."
            )
    check_cut_or_auto(batch, microbatch_size, accumulation_steps)


def check_recording() -> None:
    """Refuses a call where PyTorch records no gradients.

    Raises:
        ValueError: PyTorch records no gradients.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "backward must be called where PyTorch records gradients. Got a call under "
            "torch.no_grad() or torch.inference_mode(). Call it outside."
        )


def refuse_foreign_accumulation() -> None:
    """Refuses to run inside an accumulating loop of Accelerate, or of a library built on it.

    Raises:
        ValueError: Accelerate is set to accumulate, is accumulating now, or leaves backward passes
            to DeepSpeed or Megatron-LM.
    """
    # Looked up, never imported: programs without Accelerate must not pay for the import.
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is None:
        return
    engine = str(_shared(accelerate, "AcceleratorState").get("distributed_type"))
    if engine.endswith(("DEEPSPEED", "MEGATRON_LM")):
        raise ValueError(
            "DeepSpeed and Megatron-LM reduce and accumulate by themselves. "
            f"Got {engine} in Accelerate's AcceleratorState. Use DDP or fully_shard."
        )
    shared = _shared(accelerate, "GradientState")
    steps = (shared.get("plugin_kwargs") or {}).get("num_steps")
    if isinstance(steps, int) and steps > 1:
        raise ValueError(
            "Accelerate must leave accumulation to virtualbatch. "
            f"Got gradient_accumulation_steps={steps} in its GradientState. "
            "Make the Accelerator with gradient_accumulation_steps=1."
        )
    # The Hugging Face Trainer counts micro-batches itself. This flag is all that it sets.
    if shared.get("sync_gradients") is False:
        raise ValueError(
            "Accelerate and the Hugging Face Trainer must leave accumulation to virtualbatch. Got "
            "a call while they accumulate: sync_gradients=False in Accelerate's GradientState. "
            "Train with gradient_accumulation_steps=1, and restart Python if an accumulating loop "
            "was interrupted."
        )


def _shared(accelerate: Any, name: str) -> dict[str, Any]:
    """The state that all objects of a class of Accelerate share; empty if there is no object."""
    return getattr(getattr(accelerate, name, None), "_shared_state", None) or {}
