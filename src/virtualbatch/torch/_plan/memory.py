"""Memory as PyTorch sees it: what is left, and which errors mean that it ran out."""

import torch

from virtualbatch.plan.host_memory import host_memory
from virtualbatch.plan.out_of_memory import MemoryErrors, any_of

ERRORS = MemoryErrors(
    classes=(torch.OutOfMemoryError,),
    # PyTorch raises some of these errors as plain RuntimeErrors.
    kinds=(MemoryError, RuntimeError),
    # Each text comes from one allocator.
    certain=any_of(
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "std::bad_alloc",
        "CUDA out of memory",
        "CUDA error: out of memory",
        # cuDNN names allocations: https://docs.nvidia.com/deeplearning/cudnn/backend/latest/
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "HIP out of memory",
        "MPS backend out of memory",
        "XPU out of memory",
        # https://github.com/intel/torch-xpu-ops/issues/1598
        "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
        # https://github.com/vllm-project/vllm-omni/issues/1199
        "NPU out of memory",
        # https://github.com/mila-iqia/milabench/issues/301
        "MODULE:PT_DEVMEM Allocation failed",
    ),
    ambiguous=any_of(
        # oneDNN does not say that an allocation failed. It says the same if the system forbids
        # executable memory: https://github.com/pytorch/pytorch/issues/143651
        "could not create a primitive",
        "could not execute a primitive",
        "could not create a memory object",
        # A handle or its workspace did not fit in memory, or the driver does not match:
        # https://github.com/JuliaGPU/CUDA.jl/pull/244
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_NOT_INITIALIZED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        # On a MIG slice of a GPU PyTorch cannot write its own text, because NVML does not answer:
        # https://github.com/pytorch/pytorch/issues/112377
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED",
        # Registers are also resources: https://github.com/intel/torch-xpu-ops/issues/1526
        "UR_RESULT_ERROR_OUT_OF_RESOURCES",
        "PI_ERROR_OUT_OF_RESOURCES",
    ),
)


def left_bytes(device: torch.device | None) -> int:
    """Bytes that a window may still take.

    Args:
        device: where the parameters are; None for the host.
    """
    if device is None or device.type != "cuda":
        return host_memory().left_bytes
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    # The process may be limited to a part of the device.
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    # The allocator keeps freed memory and gives it out again.
    return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)


def largest_parameters(module: torch.nn.Module) -> list[tuple[str, int]]:
    """Names and bytes of the three largest parameters, largest first."""
    sizes = [(name, p.numel() * p.element_size()) for name, p in module.named_parameters()]
    return sorted(sizes, key=lambda found: -found[1])[:3]
