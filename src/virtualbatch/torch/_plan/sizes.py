"""What a planned micro-batch size depends on."""

from functools import cache

import torch

from virtualbatch.plan.signature import Leaf, Signature
from virtualbatch.torch._microbatch import Microbatch, known_rows
from virtualbatch.torch._window import Program
from virtualbatch.window.fingerprint import fingerprint


def signature(program: Program, batch: Microbatch) -> Signature:
    """What a plan for a batch depends on.

    Args:
        program: the loss, its weight and its modules.
        batch: the whole batch.
    """
    found = program.found
    parameters = ", ".join(f"{_name(p.dtype)}{list(p.shape)}" for p in found.parameters)
    device = found.accelerator or torch.device("cpu")
    sums = "" if program.rounding_seed is None else ", sums of bfloat16"
    return Signature(
        f"torch {torch.__version__} on {_words(device)}, parameters {parameters}{sums}",
        fingerprint(program.loss_fn, program.weight, program.backward_fn, program.has_aux),
        known_rows(batch),
        tuple(Leaf(place, tuple(x.shape[1:]), _name(x.dtype)) for place, x in batch.tensors()),
    )


@cache
def _words(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    found = torch.cuda.get_device_properties(device)
    return f"{device.type}, {found.name} of {found.total_memory} bytes"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
