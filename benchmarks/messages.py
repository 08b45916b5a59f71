"""Messages and bytes of a window in a group of 64 ranks, counted, and what they cost by formula.

One process stands for rank 0 of a group that is not there: PyTorch's fake backend takes every
collective and sends nothing. A dispatch mode counts what would be sent, for windows of 1 to 24
micro-batches; the count is compared with the formula of docs/how_it_works/messages.md.

Usage: python benchmarks/messages.py [--ranks 64] [--json FILE]
"""

from typing import Any, NamedTuple

import torch
from command import parser_of, save
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import virtualbatch.torch as vb

COUNTS = (1, 2, 4, 8, 24)
ROWS, WIDTH, CHANNELS = 48, 64, 16
# A model of 1.3e9 parameters, float32 gradients, windows of 8 micro-batches of 80 ms each.
GRADIENTS, MICROBATCHES, SECONDS = 5.2e9, 8, 0.080
BACKWARD = 2 / 3 * SECONDS
# Devices -> bytes per second that each sends to its neighbour: one node, and several on Ethernet.
BUSES = {8: 350e9, 64: 25e9, 1024: 25e9}
# Seconds of one hop: gloo over TCP between hosts, where each message takes 2 (W - 1) of them in a
# ring, and NCCL between devices, where it takes 2 log2 W in a tree.
GLOO, NCCL = 40e-6, 8e-6


class Sent(NamedTuple):
    """What a window sends.

    Fields:
        messages: collectives of a few numbers on the host.
        message_bytes: theirs.
        reductions: collectives of gradients.
        reduction_bytes: theirs.
    """

    messages: int
    message_bytes: int
    reductions: int
    reduction_bytes: int


class Counted(TorchDispatchMode):
    """Collectives that are dispatched, as (operation, dtype, bytes)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.dtype, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            size = sum(tensor.nbytes for tensor in tensors)
            self.found.append((func.__name__, tensors[0].dtype, size))
        return func(*args, **(kwargs or {}))

    def sent(self) -> Sent:
        """Gradients are float32; what ranks tell each other is not."""
        gradients = [size for _, dtype, size in self.found if dtype == torch.float32]
        others = [size for _, dtype, size in self.found if dtype != torch.float32]
        return Sent(len(others), sum(others), len(gradients), sum(gradients))


def model(normalised: bool) -> nn.Module:
    layers = [nn.Linear(WIDTH, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 1)]
    if normalised:
        layers.insert(1, nn.BatchNorm1d(CHANNELS))
    return nn.Sequential(*layers)


def reduced(_: Any, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does by itself; the fake backend's own future holds no tensor, which it reads."""
    gradients = bucket.buffer()
    distributed.all_reduce(gradients)
    found: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    found.set_result(gradients)
    return found


def counted(normalised: bool, microbatches: int) -> Sent:
    ddp = DistributedDataParallel(model(normalised))
    ddp.register_comm_hook(None, reduced)
    batch = torch.randn(ROWS, WIDTH)

    def window() -> None:
        vb.backward(
            lambda x: ddp(x).square().mean(), batch, module=ddp, accumulation_steps=microbatches
        )

    # The first one proves itself, and PyTorch sends once how it orders gradients.
    window()
    with Counted() as found:
        window()
    return found.sent()


def by_formula(normalised: bool) -> Sent:
    """See docs/how_it_works/messages.md."""
    parameters = list(model(normalised).parameters())
    before, after = 8 * 64, 8 * (8 + len(parameters))
    layers, calls = (1, 1) if normalised else (0, 0)
    moments = 8 * calls * (1 + 2 * CHANNELS) + (4 * (1 + layers) if layers else 0)
    gradients = sum(parameter.nbytes for parameter in parameters)
    return Sent(3 if layers else 2, before + after + moments, 1, gradients)


def milliseconds(devices: int) -> dict[str, float]:
    """What gradients and messages add to the micro-batches of a window."""
    reduction = 2 * (devices - 1) / devices * GRADIENTS / BUSES[devices]
    depth = (devices - 1).bit_length()
    found = {
        "after the window": reduction,
        "overlapped": max(0.0, reduction - BACKWARD),
        "each micro-batch": MICROBATCHES * max(0.0, reduction - BACKWARD),
        "messages, gloo": 2 * 2 * (devices - 1) * GLOO,
        "messages, NCCL": 2 * 2 * depth * NCCL,
    }
    return {name: seconds * 1e3 for name, seconds in found.items()}


def main() -> None:
    parser = parser_of(__doc__, ranks=64)
    arguments = parser.parse_args()
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=arguments.ranks)
    result: dict[str, Any] = {"counted": {}, "milliseconds": {}}
    for normalised in (False, True):
        expected = by_formula(normalised)
        name = "with BatchNorm" if normalised else "without BatchNorm"
        found = {number: counted(normalised, number) for number in COUNTS}
        if any(sent != expected for sent in found.values()):
            raise AssertionError(f"{name}: counted {found}, by formula {expected}")
        result["counted"][name] = found
        print(f"{name}, {arguments.ranks} ranks, {COUNTS} micro-batches, always: {expected}")
    window = MICROBATCHES * SECONDS * 1e3
    print(f"\nms added to {window:.0f} ms of micro-batches, by formula")
    for devices in BUSES:
        found = milliseconds(devices)
        result["milliseconds"][devices] = found
        print(f"{devices:5}  " + "  ".join(f"{name} {ms:.1f}" for name, ms in found.items()))
    save(arguments.json, result)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
