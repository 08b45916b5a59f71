"""The arguments of one call of a rowwise function, and calls of fn with a part of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from virtualbatch.torch._batch import ONE_LEAF, ReadBatch
from virtualbatch.torch._grad_watch import check_recording
from virtualbatch.torch._microbatch import Microbatch, known_rows, on_device
from virtualbatch.torch._modules import Inventory
from virtualbatch.window.tree import Builder, builder


class Called(NamedTuple):
    """The result of fn for a micro-batch, and the leaves that fn was given.

    Fields:
        outputs: the leaves of the result, each with the expression that reaches it.
        build: leaves -> the structure that fn returned.
        shared: new leaves that replace the shared tensors that take a gradient.
        rows: new leaves that replace the rows that take a gradient, by their place in the batch.
    """

    outputs: list[tuple[str, Any]]
    build: Builder
    shared: list[torch.Tensor]
    rows: dict[int, torch.Tensor]


class Inputs:
    """The arguments of one call.

    Args:
        fn: (batch, *shared) -> outputs with one entry per row.
        found: what the modules of fn hold.
        batch: the batch or Window.
        shared: arguments that every micro-batch gets whole.

    Attributes:
        fn: as given.
        found: as given.
        batch: as given.
        devices: all devices except the host.
        shared: the shared tensors that take a gradient.
        rows: the tensors of the batch that take a gradient. Keys are the number of a Window's
            micro-batch (0 for a batch), and the place in it.
    """

    def __init__(
        self, fn: Callable[..., Any], found: Inventory, batch: ReadBatch, shared: tuple[Any, ...]
    ):
        self.found = found
        self.batch = batch
        self.fn = fn
        leaves: list[tuple[str, Any]] = []
        self._build_shared = builder(shared, "shared", leaves, ONE_LEAF, lists=False)
        self._shared = [leaf for _, leaf in leaves]
        self.shared = [leaf for leaf in self._shared if _is_trained(leaf)]
        self.rows = {
            (index, place): leaf
            for index, microbatch in enumerate(batch.given)
            for place, leaf in enumerate(microbatch.leaves)
            if _is_trained(leaf)
        }
        self._places = frozenset(place for _, place in self.rows)
        self.devices = {*found.devices, *(x.device for x in self.tensors() if not x.is_cpu)}

    def detached(self) -> ReadBatch:
        """The batch without the graphs that its rows come from."""
        if not self.rows:
            return self.batch
        given = [each.with_tensors(torch.Tensor.detach) for each in self.batch.given]
        return self.batch._replace(given=given)

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the batch and the shared arguments."""
        rows = [tensor for microbatch in self.batch.given for _, tensor in microbatch.tensors()]
        return [*rows, *(x for x in self._shared if isinstance(x, torch.Tensor))]

    def trained(self) -> list[torch.Tensor]:
        """All tensors that take a gradient: parameters, shared tensors, rows."""
        return [*self.found.parameters, *self.shared, *self.rows.values()]

    def starts(self) -> list[int]:
        """The number of the first row of each given micro-batch."""
        sizes = [known_rows(microbatch) for microbatch in self.batch.given]
        return [sum(sizes[:index]) for index in range(len(sizes))]

    def whole(self) -> Any:
        """What fn returns for the whole batch, which is one micro-batch."""
        (microbatch,) = self.batch.given
        if self.found.accelerator is not None:
            microbatch = on_device(microbatch, self.found.accelerator)
        result = self.fn(microbatch.get(), *self._build_shared(self._shared))
        check_recording(True)
        return result

    def call(self, microbatch: Microbatch) -> Called:
        """Calls fn for a micro-batch, with leaves that have no graph.

        Rows are copied, so that fn may change them in place in each pass.

        Args:
            microbatch: a micro-batch of the cut.
        """
        rows: dict[int, torch.Tensor] = {}
        leaves: list[Any] = []
        for place, leaf in enumerate(microbatch.leaves):
            if place in self._places:
                leaf = rows[place] = leaf.detach().requires_grad_()
            elif isinstance(leaf, torch.Tensor):
                leaf = leaf.clone()
            leaves.append(leaf)
        own = microbatch._replace(leaves=leaves, given=None)
        if self.found.accelerator is not None:
            own = on_device(own, self.found.accelerator)
        shared = [x.detach().requires_grad_() if _is_trained(x) else x for x in self._shared]
        records = torch.is_grad_enabled()
        result = self.fn(own.get(), *self._build_shared(shared))
        check_recording(records)
        outputs: list[tuple[str, Any]] = []
        build = builder(result, "output", outputs, ONE_LEAF, lists=False)
        return Called(outputs, build, [x for x in shared if _is_trained(x)], rows)


def _is_trained(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad
