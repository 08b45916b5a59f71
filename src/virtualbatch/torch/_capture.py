"""Micro-batches of one shape as one CUDA graph: small ones no longer wait for Python.

A shape that is seen for the first time takes the normal path, which loads what kernels need. When
the shape is seen again, its forward and backward pass are captured. From then on they are replayed
for each micro-batch: its rows and its share are copied to where the graph reads them, and the graph
adds to the sums of the window. The sums are added to `.grad` at the end of the window. What cannot
be captured takes the normal path, and one log line says why.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from virtualbatch.torch._batch import SHARED
from virtualbatch.torch._commit import Commit
from virtualbatch.torch._gradients import HALF
from virtualbatch.torch._leaves import foreign_leaves
from virtualbatch.torch._loss import checked_terms
from virtualbatch.torch._microbatch import Microbatch
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._undo import Undo
from virtualbatch.window.row_list import RowList, stranger
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import SINGLE, check_same_terms, check_total

_log = logging.getLogger(__name__)

# Each graph keeps the activations of a micro-batch, so there must be few of them.
MOST_GRAPHS = 8


class Captured:
    """A loss function whose micro-batches are replayed. A plain call runs the loss function.

    Args:
        loss_fn: micro-batch -> loss, or a dict of terms.
    """

    def __init__(self, loss_fn: Callable[[Any], Any]):
        # The name, docstring and signature are copied. Attributes are not: a module has many.
        functools.update_wrapper(self, loss_fn, updated=())
        self._loss_fn = loss_fn
        self._state: Any = None
        # Shape -> its graph; None for a shape that was seen once.
        self._graphs: dict[Any, _Graph | None] = {}
        self._totals: _Totals | None = None
        self._told: set[str] = set()
        self._gave_up = False

    def __call__(self, batch: Any) -> Any:
        """What the loss function returns."""
        return self._loss_fn(batch)

    def replayed(
        self, found: Inventory, cut: Sequence[Microbatch], shares: Shares
    ) -> torch.Tensor | None:
        """Runs a window by replaying, and adds its gradients to `.grad`.

        Args:
            found: what the modules hold.
            cut: the micro-batches, on the host or the device.
            shares: the shares of the window.

        Returns:
            The mean loss, a detached scalar. None if the window takes the normal path; then
            nothing was changed.
        """
        names = [SINGLE] if shares.terms is None else list(shares.terms)
        parts = [shares.of(names, index) for index in range(len(cut))]
        counted = [index for index, share in enumerate(parts) if any(share)]
        # A term without a share may be NaN, and a graph would multiply that NaN by zero.
        if self._gave_up or not counted or not all(all(parts[index]) for index in counted):
            return None
        try:
            graphs = self._graphs_of(found, [cut[index] for index in counted], shares)
        except _CannotBeCapturedError as error:
            self._gave_up = True
            self._forget(None)
            self.tell(str(error))
            return None
        if graphs is None or self._totals is None:
            return None
        self._totals.zero()
        for index, graph in zip(counted, graphs, strict=True):
            graph.replay(cut[index], parts[index])
        self._totals.commit(found.parameters, {k for graph in graphs for k in graph.reached})
        dtype = _common_dtype([graph.dtype for graph in graphs])
        return self._totals.loss.to(dtype, copy=True)

    def tell(self, reason: str) -> None:
        """Logs, once, why a window takes the normal path."""
        if reason not in self._told:
            self._told.add(reason)
            _log.warning("Micro-batches are not captured as CUDA graphs: %s.", reason)

    def _graphs_of(
        self, found: Inventory, cut: Sequence[Microbatch], shares: Shares
    ) -> "list[_Graph] | None":
        """The graph of each micro-batch, captured if need be; None if a shape is new."""
        state = _state(found, shares)
        if state != self._state:
            # The captured graphs read memory and took branches that are no longer right.
            self._forget(state)
        shapes = [_shape(microbatch) for microbatch in cut]
        if not self._graphs.keys() >= set(shapes):
            self._graphs = dict.fromkeys(shapes) | self._graphs
            if len(self._graphs) > MOST_GRAPHS:
                raise _CannotBeCapturedError(f"micro-batches have more than {MOST_GRAPHS} shapes")
            return None
        if self._totals is None:
            self._totals = _Totals(found)
        graphs = []
        for shape, microbatch in zip(shapes, cut, strict=True):
            graph = self._graphs[shape]
            if graph is None:
                graph = _Graph(self._loss_fn, found.parameters, microbatch, shares, self._totals)
                self._graphs[shape] = graph
            graphs.append(graph)
        return graphs

    def _forget(self, state: Any) -> None:
        """Drops all graphs. New graphs will be captured in the given state."""
        self._state, self._graphs, self._totals = state, {}, None


class _CannotBeCapturedError(Exception):
    """Says why micro-batches cannot be captured."""


class _Totals:
    """The sums of a window, in the same memory for every graph and window."""

    def __init__(self, found: Inventory):
        device = found.accelerator
        if device is None or device.type != "cuda":
            raise _CannotBeCapturedError("the parameters are on no CUDA device")
        for parameter in found.parameters:
            if parameter.dtype in HALF:
                raise _CannotBeCapturedError("there are parameters in half precision")
        self.gradients = [torch.zeros_like(p, requires_grad=False) for p in found.parameters]
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.pool = torch.cuda.graph_pool_handle()

    def zero(self) -> None:
        """Sets the sums to zero at the start of a window."""
        torch._foreach_zero_([*self.gradients, self.loss])

    def commit(self, parameters: Sequence[torch.nn.Parameter], reached: set[int]) -> None:
        """Adds the gradients of the parameters that were reached to `.grad`."""
        commit = Commit()
        fresh = [k for k in reached if parameters[k].grad is None]
        copies = [torch.empty_like(self.gradients[k]) for k in fresh]
        with torch.no_grad():
            if fresh:
                torch._foreach_copy_(copies, [self.gradients[k] for k in fresh])
            for k in reached.difference(fresh):
                commit.gradient(parameters[k], parameters[k].grad, self.gradients[k])
            for k, copied in zip(fresh, copies, strict=True):
                commit.gradient(parameters[k], None, copied)
        with Undo(partial(_empty, [parameters[k] for k in fresh])) as undo:
            commit.run(undo)


def _empty(parameters: Sequence[torch.nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


class _Graph:
    """Forward and backward pass of one shape of micro-batch. Nothing is computed until `replay`.

    Args:
        loss_fn: the loss function.
        parameters: the parameters that take a gradient.
        microbatch: a micro-batch of that shape.
        shares: the shares of a window. They name the terms that have weights of their own.
        totals: the sums that the graph adds to.

    Raises:
        _CannotBeCapturedError: CUDA or the loss function does not allow it.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any], Any],
        parameters: Sequence[torch.nn.Parameter],
        microbatch: Microbatch,
        shares: Shares,
        totals: _Totals,
    ):
        device = totals.loss.device
        self._leaves = [
            torch.empty_like(leaf, device=device) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in microbatch.leaves
        ]
        names = shares.terms
        self._shares = [torch.zeros_like(totals.loss) for _ in names or (None,)]
        self._parts: Sequence[float] = [0.0] * len(self._shares)
        self._graph = torch.cuda.CUDAGraph()
        with _capturing(self._graph, totals.pool):
            terms = checked_terms(loss_fn(microbatch.build(self._leaves)))
            if names is None:
                check_total(terms)
                each = self._shares * len(terms)
            else:
                check_same_terms(terms, names)
                each = [dict(zip(names, self._shares, strict=True))[name] for name in terms]
            self.dtype, gradients = _differentiated(terms, each, parameters, totals.loss)
            self.reached = {k for k, x in enumerate(gradients) if x is not None}
            torch._foreach_add_(
                [totals.gradients[k] for k in self.reached],
                [gradients[k] for k in self.reached],
            )

    def replay(self, microbatch: Microbatch, parts: Sequence[float]) -> None:
        """Adds a micro-batch to the totals.

        Args:
            microbatch: a micro-batch of the same shape.
            parts: the share of each of its terms.
        """
        for held, leaf in zip(self._leaves, microbatch.leaves, strict=True):
            if isinstance(leaf, torch.Tensor):
                held.copy_(leaf, non_blocking=True)
        if parts != self._parts:
            for share, part in zip(self._shares, parts, strict=True):
                share.fill_(part)
            self._parts = parts
        self._graph.replay()


def _differentiated(
    terms: Mapping[Any, torch.Tensor],
    shares: Sequence[torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    loss: torch.Tensor,
) -> tuple[torch.dtype, Sequence[torch.Tensor | None]]:
    """Adds the weighted terms to the loss.

    Returns:
        The common dtype of the terms, and the gradients of their weighted sum.
    """
    dtypes = [term.dtype for term in terms.values()]
    if not HALF.isdisjoint(dtypes):
        raise _CannotBeCapturedError("the loss is in half precision")
    if foreign_leaves(terms.values(), parameters):
        raise _CannotBeCapturedError("the loss depends on a tensor that is in no module")
    reached, starts = [], []
    for term, share in zip(terms.values(), shares, strict=True):
        loss.add_(term.detach() * share)
        if term.requires_grad:
            reached.append(term)
            starts.append(share.to(term.dtype))
    with torch.autocast("cuda", enabled=False):
        found = torch.autograd.grad(reached, parameters, starts, allow_unused=True)
    if any(x is not None and x.is_sparse for x in found):
        raise _CannotBeCapturedError("a gradient is sparse")
    return _common_dtype(dtypes), found


def _common_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


@contextmanager
def _capturing(graph: Any, pool: Any) -> Iterator[None]:
    stream, generator = torch.cuda.current_stream(), _generator()
    state = generator.clone_state()
    cached = torch.is_autocast_cache_enabled()
    # A cached cast would keep the weight's value at the time of the capture. It also ties its
    # parameter to the stream of the cast: https://github.com/pytorch/pytorch/pull/84289
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        # Threads that pin memory for a data loader may go on.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    except RuntimeError as error:
        # A failed capture leaves its own stream as the current one. It also leaves the generator
        # in a state that only a graph may draw from.
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise _CannotBeCapturedError(str(error).partition("\n")[0]) from error
    finally:
        torch.set_autocast_cache_enabled(cached)


def _generator() -> Any:
    """The default generator of the present CUDA device."""
    return torch.cuda.default_generators[torch.cuda.current_device()]


def _state(found: Inventory, shares: Shares) -> tuple[Any, ...]:
    """Everything that a captured graph takes for granted."""
    modules = [layer for root in found.roots for layer in root.modules()]
    tensors = [*found.parameters, *(x for layer in modules for x in layer._buffers.values())]
    autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
    return (
        autocast,
        shares.terms and tuple(shares.terms),
        tuple(layer.training for layer in modules),
        tuple(x.data_ptr() for x in tensors if x is not None),
    )


def _shape(microbatch: Microbatch) -> tuple[Any, ...]:
    """A key that is equal for all micro-batches that one graph serves."""
    return (
        microbatch.places,
        *(
            (leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else _in_words(leaf)
            for leaf in microbatch.leaves
        ),
    )


def _in_words(leaf: Any) -> str:
    if isinstance(leaf, RowList) and stranger(leaf.items, SHARED) is not None:
        # Different objects may have the same repr.
        raise _CannotBeCapturedError("a list of the batch holds objects")
    return repr(leaf)
