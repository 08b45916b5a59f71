"""Replicas of a DistributedDataParallel, whose own reducer adds up the gradients of a window once.

Micro-batches run without a collective, so each rank may have any number of them. The finished
gradients wait behind the loss. The backward pass of that loss is the only one that the reducer
sees.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import distributed
from torch.autograd.graph import get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from virtualbatch.torch._conclusion import Ran
from virtualbatch.torch._handover import Finished, hooks_set_aside
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._replicas.checks import check_ddp, check_group, check_reduce
from virtualbatch.torch._replicas.replicas import Replicas
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._window import Program

# DDP module -> the parameters that its reducer was made for.
_MADE_FOR: Any = WeakIdKeyDictionary()


class Replicated(Replicas):
    """See `Replicas`.

    Args:
        found: what the modules of the window hold.
        group: as the caller gave it.
        reduce: as the caller gave it.

    Raises:
        ValueError: a module, its group or a parameter cannot be used.
    """

    can_run_alone = True

    def __init__(self, found: Inventory, group: Any, reduce: str | None):
        self._found = found
        self._modules: list[Any] = found.distributed
        check_reduce(reduce, ("window", "overlapped"), "DistributedDataParallel")
        self.overlaps = reduce == "overlapped"
        for module in self._modules:
            check_ddp(module)
        self.group = self._modules[0].process_group
        self.size = distributed.get_world_size(self.group)
        check_group([module.process_group for module in self._modules], group)
        self._check_parameters()

    def settle(self) -> None:
        """See `Replicas`."""
        self._rebuild_buckets()
        # Buffers of BatchNorm are the same on all ranks after a window. Other buffers are copied
        # from rank 0, as in every forward pass of plain DDP. Else ranks would train different
        # models.
        if not all(isinstance(layer, _BatchNorm) for layer in self._found.with_buffers):
            for module in self._modules:
                if module.forward_sync_buffers:
                    module._sync_buffers()

    def check(self, program: Program) -> None:
        """See `Replicas`. With statistics, `.grad` must be empty before the window."""
        grads = [parameter.grad for parameter in self._found.parameters]
        if program.stats and any(x is not None and bool(x.any()) for x in grads):
            raise ValueError(
                "Statistics over ranks need an empty .grad, because reduced gradients are added "
                "to what it holds. Got gradients of an earlier window in it. Call zero_grad() "
                "before."
            )

    def begin(self, *, is_filler: bool, is_last: bool) -> None:
        """See `Replicas`. Does nothing, because these ranks can run alone."""

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See `Replicas`."""
        with ExitStack() as stack:
            stack.enter_context(self.quiet())
            for module in self._modules:
                stack.enter_context(Undo(partial(setattr, module, "reducer", module.reducer)))
                module.reducer = _KeepsBuckets(module.reducer)
            yield

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Replicas`."""
        with ExitStack() as stack:
            for module in self._modules:
                # The same as `no_sync`, but also safe against an interrupt. A forward pass would
                # broadcast buffers even without synchronisation.
                for name in ("require_backward_grad_sync", "require_forward_param_sync"):
                    stack.enter_context(Undo(partial(setattr, module, name, getattr(module, name))))
                module.require_backward_grad_sync = False
                module.require_forward_param_sync = False
            stack.enter_context(hooks_set_aside(self._found.owner, self._found.parameters))
            yield

    def finished(self, ran: Ran, reached: Sequence[bool], scale: torch.Tensor | None) -> Finished:
        """See `Replicas`."""
        tables = {id(table) for module in self._modules for table in _sparse_tables(module)}
        parameters = self._found.parameters
        taken = ran.gradients.taken()
        # Every parameter gets a gradient from the handover. So if several losses share a backward
        # pass, no reduction begins before all of them are handed over.
        gradients = [
            _zeros(parameter, id(parameter) in tables) if gradient is None else gradient
            for parameter, gradient in zip(parameters, taken, strict=True)
        ]
        # Only `Finished` may hold the gradients, or PyTorch would copy them into `.grad`.
        del taken
        unreached = [p for p, found in zip(parameters, reached, strict=True) if not found]
        empty: list[torch.Tensor] = []

        def added_up() -> None:
            for module in self._modules:
                module._check_reducer_finalized()
            _empty_again(empty)
            self._rebuild_buckets()

        def prepared() -> None:
            for module in self._modules:
                _prepare(module)

        def armed() -> None:
            _refuse_partial(parameters)
            empty.extend(parameter for parameter in unreached if parameter.grad is None)
            if not self.overlaps:
                prepared()
            engine: Any = torch.autograd.Variable._execution_engine
            # DDP ends its reduction in a callback that it queues later. Ours must run after that.
            engine.queue_callback(lambda: engine.queue_callback(added_up))

        if self.overlaps:
            # The last micro-batch may reach parameters before the handover does.
            prepared()
        return Finished(parameters, gradients, scale, armed)

    def _rebuild_buckets(self) -> None:
        for module in self._modules:
            module.reducer._rebuild_buckets()

    def _check_parameters(self) -> None:
        """Refuses parameters that no reducer was made for."""
        inside: dict[int, torch.Tensor] = {}
        for module in self._modules:
            held = {
                id(parameter): parameter
                for name, parameter in module.module.named_parameters()
                if name not in module.parameters_to_ignore
            }
            _refuse_others(module, {key for key, x in held.items() if x.requires_grad})
            inside |= held
        for parameter in self._found.parameters:
            if id(parameter) not in inside:
                raise ValueError(
                    "Gradients of all parameters must be added up over ranks. Got a parameter of "
                    f"shape {tuple(parameter.shape)} that the DistributedDataParallel does not "
                    "hold, or ignores. Wrap a module that holds every trained parameter, or "
                    "freeze this one."
                )


class _MadeFor(NamedTuple):
    """The parameters of a reducer.

    Fields:
        number: the number of its parameters.
        parameters: the parameters that it lists, by identity.
    """

    number: int
    parameters: set[int]


class _KeepsBuckets:
    """A reducer that does not rebuild its buckets, because that needs all ranks.

    Args:
        reducer: the reducer of a DistributedDataParallel.
    """

    def __init__(self, reducer: Any):
        self._reducer = reducer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reducer, name)

    def _rebuild_buckets(self) -> bool:
        return False


class _Reach(torch.autograd.Function):
    """A scalar whose graph reaches parameters, but gives them no gradient."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.count = len(parameters)
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[None, ...]:
        return (None,) * ctx.count


def _prepare(module: Any) -> None:
    """Arms the reducer for the backward pass that has begun, as Accelerate and Lightning do.

    Args:
        module: a DistributedDataParallel.
    """
    outputs = []
    if module.find_unused_parameters:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            outputs = [_Reach.apply(*trained)]
    module.reducer.prepare_for_backward(outputs)


def _refuse_partial(parameters: Sequence[torch.Tensor]) -> None:
    """Refuses a backward pass that does not add to the `.grad` of every parameter.

    Args:
        parameters: the parameters that get a gradient from the handover.

    Raises:
        RuntimeError: the pass leaves a parameter out, or returns its gradient elsewhere.
    """
    try:
        nodes = (get_gradient_edge(parameter).node for parameter in parameters)
        is_whole = all(map(torch._C._will_engine_execute_node, nodes))
    except RuntimeError:
        # PyTorch raises for a leaf whose gradient is not added to `.grad`.
        is_whole = False
    if not is_whole:
        raise RuntimeError(
            "A DistributedDataParallel reduces gradients as they reach .grad. Got autograd.grad, "
            "or a backward pass with inputs=. Call backward() on the loss."
        )


def _empty_again(parameters: Sequence[torch.Tensor]) -> None:
    """Sets `.grad` to None again for parameters that no loss has reached on any rank.

    Args:
        parameters: the parameters that no micro-batch has reached. Another loss in the same
            backward pass may have reached them.
    """
    found = [parameter for parameter in parameters if parameter.grad is not None]
    # One copy to the host for all of them.
    if not found:
        return
    device = found[0].device
    any_of = [_values(parameter.grad).any().to(device) for parameter in found]
    for parameter, is_reached in zip(found, torch.stack(any_of).tolist(), strict=True):
        if not is_reached:
            parameter.grad = None


def _values(gradient: Any) -> torch.Tensor:
    found: torch.Tensor = gradient.coalesce().values() if gradient.is_sparse else gradient
    return found


def _refuse_others(module: DistributedDataParallel, trained: set[int]) -> None:
    """Refuses parameters that were frozen or unfrozen after the module was wrapped.

    Args:
        module: the module whose reducer is checked.
        trained: its trainable parameters now, by identity.

    Raises:
        ValueError: the reducer was made for other parameters.
    """
    made_for = _made_for(module)
    if len(trained) == made_for.number and made_for.parameters <= trained:
        return
    others = " others" if len(trained) == made_for.number else ""
    raise ValueError(
        "A DistributedDataParallel must be made after parameters are frozen or unfrozen. Got "
        f"{len(trained)} trainable parameters, and {made_for.number}{others} when it was made. "
        "Wrap the module again."
    )


def _made_for(module: DistributedDataParallel) -> _MadeFor:
    if module not in _MADE_FOR:
        number = module._get_ddp_logging_data()["num_parameter_tensors"]
        # With sparse gradients PyTorch cannot list the parameters. Otherwise the list comes with
        # zeros as large as all gradients. This happens once, before there are activations.
        buckets = [] if _sparse_tables(module) else module.reducer._get_zeros_like_grad_buckets()
        parameters = {id(parameter) for bucket in buckets for parameter in bucket.parameters()}
        _MADE_FOR[module] = _MadeFor(number, parameters)
    found: _MadeFor = _MADE_FOR[module]
    return found


def _sparse_tables(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters whose gradients are sparse."""
    tables = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return [
        layer.weight for layer in module.modules() if isinstance(layer, tables) and layer.sparse
    ]


def _zeros(parameter: torch.Tensor, is_sparse: bool) -> torch.Tensor:
    """The gradient of a parameter that only other ranks have reached."""
    if not is_sparse:
        return torch.zeros_like(parameter)
    # DDP expects a sparse gradient whose values are whole rows.
    nowhere = torch.empty((1, 0), dtype=torch.int64, device=parameter.device)
    rows = parameter.detach().new_empty((0, *parameter.shape[1:]))
    return torch.sparse_coo_tensor(nowhere, rows, parameter.shape, check_invariants=False)
