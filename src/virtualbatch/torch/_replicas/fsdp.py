"""Replicas of fully sharded modules: FSDP2, also with replicas of shards or tensor parallelism.

Such a module gathers parameters in each forward and backward pass, and adds up gradients itself. By
default it does so after each micro-batch, so that each rank holds its shard of them. Errors before
the first micro-batch of a window and after the last one are raised on all ranks, and nothing is
written. A rank that raises in between leaves the others in a gather. They wait there until the
process ends or the time limit of their group has passed.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed
from torch.distributed.tensor import DTensor

from virtualbatch.torch._batchnorm import is_tracked
from virtualbatch.torch._conclusion import Ran
from virtualbatch.torch._gradients import HALF
from virtualbatch.torch._handover import Finished, hooks_set_aside
from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._replicas.checks import check_reduce, refuse_talking_layers
from virtualbatch.torch._replicas.mesh import reducing_group
from virtualbatch.torch._replicas.replicas import Replicas
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._window import Program


class Sharded(Replicas):
    """See `Replicas`.

    Args:
        found: what the modules of the window hold.
        group: as the caller gave it.
        reduce: as the caller gave it.

    Raises:
        ValueError: a module, its mesh or a parameter cannot be used.
    """

    can_run_alone = False
    overlaps = False

    def __init__(self, found: Inventory, group: Any, reduce: str | None):
        self._found = found
        self._modules: list[Any] = found.distributed
        self._outermost = _outermost(self._modules)
        check_reduce(reduce, ("microbatch", "window"), "fully sharded module")
        self._in_window = reduce == "window"
        for module in self._outermost:
            refuse_talking_layers(module)
        self._check_parameters()
        self.group = reducing_group(found.parameters, group)
        self.size = self._divisor()
        self._check_dtypes()
        self._has_begun = False
        self._in_training: list[torch.nn.Module] = []

    def check(self, program: Program) -> None:
        """See `Replicas`. Statistics are refused: gradients are added up over ranks at once."""
        if program.stats:
            raise ValueError(
                "Statistics need the gradients of single micro-batches. Got stats=True with "
                "fully_shard, which shows only sums over all ranks. Leave stats out."
            )

    def settle(self) -> None:
        """See `Replicas`. Nothing is due, because each micro-batch gathers for itself."""

    def alone(self) -> AbstractContextManager[None]:
        """See `Replicas`. Never called, because `found.refuse_in_step` refuses before."""
        raise ValueError("internal: ranks that run in step run alone.")

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """See `Replicas`."""
        self._has_begun = False
        with ExitStack() as stack:
            stack.enter_context(Undo(self._put_to_rest))
            stack.enter_context(hooks_set_aside(self._found.owner, self._found.parameters))
            try:
                yield
            except BaseException:
                if self._has_begun:
                    self._forget_gathered()
                raise

    def begin(self, *, is_filler: bool, is_last: bool) -> None:
        """See `Replicas`."""
        self._has_begun = True
        for module in self._outermost:
            module.set_requires_gradient_sync(is_last or not self._in_window)
            # Replicas of shards exchange gradients once per window.
            module.set_requires_all_reduce(is_last)
        if is_filler and not self._in_training:
            # One row has no variance, and fillers must not count in the statistics.
            self._in_training = list(filter(is_tracked, self._found.with_buffers))
            for layer in self._in_training:
                layer.training = False

    def finished(self, ran: Ran, reached: Sequence[bool], scale: torch.Tensor | None) -> Finished:
        """See `Replicas`. These gradients are already added up over ranks."""
        parameters, gradients = [], []
        taken = ran.gradients.taken()
        for parameter, gradient in zip(self._found.parameters, taken, strict=True):
            if gradient is not None:
                parameters.append(parameter)
                gradients.append(gradient)
        # Only `Finished` may hold the gradients, or PyTorch would copy them into `.grad`.
        del taken
        return Finished(parameters, gradients, scale)

    def _put_to_rest(self) -> None:
        """Leaves modules as they are between steps, however the window has ended."""
        for layer in self._in_training:
            layer.training = True
        self._in_training = []
        for module in self._outermost:
            module.set_requires_gradient_sync(True)
            module.set_requires_all_reduce(True)
        if not self._has_begun:
            return
        for module in self._modules:
            # Only the modules that were called first can be reset; the others refuse. Without a
            # reset, forward passes without a backward pass would make the next backward pass
            # gather more. Only some ranks may have run such passes, on shapes alone.
            if module._get_fsdp_state()._is_root:
                module.reset_iter_state()

    def _forget_gathered(self) -> None:
        """Forgets unsharded gradients that wait to be added up at the last micro-batch.

        PyTorch 2.13 keeps them, against its documentation, and adds them to those of the next
        window.
        """
        for group in self._groups():
            for sharded in group.fsdp_params:
                sharded.unsharded_accumulated_grad = None
                gathered = getattr(sharded, "_unsharded_param", None)
                if gathered is not None:
                    gathered.grad = None

    def _groups(self) -> Iterator[Any]:
        """Groups of parameters that are gathered together. No public call returns their settings.

        Yields:
            The groups of all modules.
        """
        for module in self._modules:
            yield from module._get_fsdp_state()._fsdp_param_groups

    def _divisor(self) -> float:
        ranks = distributed.get_world_size(self.group)
        found = {group.gradient_divide_factor or ranks for group in self._groups()}
        if len(found) != 1:
            raise ValueError(
                "All modules of a window must divide gradients by the same number. "
                f"Got {', '.join(map(str, sorted(found)))} from set_gradient_divide_factor. "
                "Set one for all of them."
            )
        return float(found.pop())

    def _check_parameters(self) -> None:
        """Refuses parameters whose gradients would not be added up over ranks."""
        inside = {id(x) for module in self._outermost for x in module.parameters()}
        for parameter in self._found.parameters:
            if id(parameter) not in inside or not isinstance(parameter, DTensor):
                raise ValueError(
                    "Gradients of all parameters must be added up over ranks. Got a parameter of "
                    f"shape {tuple(parameter.shape)} that fully_shard does not hold, or ignores. "
                    "Call fully_shard on a module that holds every trained parameter, or freeze "
                    "this one."
                )

    def _check_dtypes(self) -> None:
        """Refuses to add up gradients of several micro-batches in half precision."""
        for group in self._groups():
            trained = [x.sharded_param for x in group.fsdp_params if x.sharded_param.requires_grad]
            policy = group.mp_policy
            for parameter in trained:
                dtype = policy.reduce_dtype or policy.param_dtype or parameter.dtype
                if dtype not in HALF:
                    continue
                name = str(dtype).removeprefix("torch.")
                if self._in_window:
                    raise ValueError(
                        'reduce="window" adds unsharded gradients in the reduce dtype, which must '
                        f"be float32. Got {name}. Make the policy with "
                        'reduce_dtype=torch.float32, or use reduce="microbatch".'
                    )
                if parameter.placements[0].is_replicate():
                    raise ValueError(
                        "Replicas of shards add gradients of micro-batches in the reduce dtype, "
                        f"which must be float32. Got {name}. "
                        "Make the policy with reduce_dtype=torch.float32."
                    )


def _outermost(modules: Sequence[Any]) -> list[Any]:
    """The modules that are in no other of the modules."""
    inside = {id(x) for module in modules for x in module.modules() if x is not module}
    return [module for module in modules if id(module) not in inside]
