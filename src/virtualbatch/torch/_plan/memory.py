"""Memory as PyTorch sees it: what is left, and which errors mean that it ran out."""

import torch

from virtualbatch.plan.host_memory import host_memory

# A RuntimeError has no class of its own for these; each text is that of one allocator.
_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "HIP out of memory",
    "XPU out of memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; by its class, else by its text.

    Args:
        error: what was raised.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _TEXTS)


def left_bytes(device: torch.device | None) -> int:
    """Bytes that a window may still take.

    Args:
        device: where the parameters are; None for the host.
    """
    if device is None or device.type != "cuda":
        return host_memory().left_bytes
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    # A process may have been told to take a part of the device only.
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    # The allocator keeps what was freed, and gives it out again.
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def largest_parameters(module: torch.nn.Module) -> list[tuple[str, int]]:
    """Names and bytes of the three largest parameters, largest first."""
    sizes = [(name, p.numel() * p.element_size()) for name, p in module.named_parameters()]
    return sorted(sizes, key=lambda found: -found[1])[:3]
