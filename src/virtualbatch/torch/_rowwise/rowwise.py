"""`rowwise`: a function with one output entry per row, run with the memory of a micro-batch."""

import functools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import torch

from virtualbatch.plan.auto import Auto, check_cut_or_auto, check_sizes_or_auto, is_automatic
from virtualbatch.torch._as_written import as_written
from virtualbatch.torch._batch import read
from virtualbatch.torch._call import Trained
from virtualbatch.torch._coupled import tell
from virtualbatch.torch._distributed import number_of_processes
from virtualbatch.torch._fit import Fit
from virtualbatch.torch._loose import as_modules
from virtualbatch.torch._microbatch import Microbatch, known_rows, most_rows
from virtualbatch.torch._modules import Inventory, inventory
from virtualbatch.torch._rowwise.first_pass import first_pass
from virtualbatch.torch._rowwise.inputs import Inputs
from virtualbatch.torch._rowwise.memory import refuses_another_cut
from virtualbatch.torch._rowwise.node import behind
from virtualbatch.torch._rowwise.proof import prove_first_call
from virtualbatch.torch._rowwise.replay import Replay
from virtualbatch.torch._rowwise.second_pass import SecondPass
from virtualbatch.torch._rowwise.surrogate import Surrogate
from virtualbatch.torch._undo import Undo, all_or_nothing, undone_if_cut
from virtualbatch.torch._window import Program
from virtualbatch.window.options import check_flags
from virtualbatch.window.terms import SUM
from virtualbatch.window.window import Window

# What a function returns: tensors with one entry per row, in any structure.
Outputs = TypeVar("Outputs")


class Rowwise(Generic[Outputs]):
    """The function that `rowwise` returns.

    Args:
        fn: as in `rowwise`.
        module: as in `rowwise`.
        microbatch_size: as in `rowwise`.
        accumulation_steps: as in `rowwise`.
        check: as in `rowwise`.
    """

    def __init__(
        self,
        fn: Callable[..., Outputs],
        module: Trained | Iterable[Trained] | None,
        microbatch_size: int | Literal["auto"] | Auto | None,
        accumulation_steps: int | None,
        check: bool,
    ):
        # The name, docstring and signature are copied. Attributes are not: a module has many.
        functools.update_wrapper(self, fn, updated=())
        self.fn = fn
        self._microbatch_size = microbatch_size
        self._accumulation_steps = accumulation_steps
        self._check = check
        if module is None:
            module = fn if isinstance(fn, torch.nn.Module) else ()
        # A function without modules has no parameters of its own.
        self.modules = list(as_modules(module)) or [torch.nn.Module()]

    def __call__(self, batch: Any, *shared: Any) -> Outputs:
        """What fn returns for the whole batch."""
        found: Outputs = self._called(batch, shared)
        return found

    @as_written
    @undone_if_cut
    def _called(self, batch: Any, shared: tuple[Any, ...]) -> Any:
        check_cut_or_auto(batch, self._microbatch_size, self._accumulation_steps)
        if not torch.is_grad_enabled() and not isinstance(batch, Window):
            return self.fn(batch, *shared)
        found = self.inventory()
        inputs = Inputs(self.fn, found, read(batch), shared)
        program = Program(self.fn, SUM, False, None, found)
        if is_automatic(self._microbatch_size):
            _refuse_planning()
            program = Surrogate(self.fn, shared, found).of_rows()
        fit = Fit(program, inputs.detached(), self._microbatch_size, self._accumulation_steps)
        tell(most_rows(fit.cut))

        def run(cut: Sequence[Microbatch]) -> Any:
            return all_or_nothing(partial(run_cut, cut))

        def run_cut(cut: Sequence[Microbatch]) -> Any:
            if len(cut) == 1:
                return inputs.whole()
            if self._check:
                sizes = list(map(known_rows, cut))
                prove_first_call(inputs, lambda: Surrogate(self.fn, shared, found), sizes)
            return _in_two_passes(inputs, cut, fit)

        return fit.run(run)

    def size(self) -> tuple[int | None, int | None]:
        """The size and the number of micro-batches. A size that is to be planned is None."""
        size: Any = self._microbatch_size
        return None if is_automatic(size) else size, self._accumulation_steps

    def inventory(self) -> Inventory:
        """The contents of the modules.

        Raises:
            ValueError: a module adds up gradients over ranks itself.
        """
        found = inventory(self.modules, hands_over=True, may_be_frozen=True)
        _refuse_distributed(found.distributed)
        return found


def _in_two_passes(inputs: Inputs, cut: Sequence[Microbatch], fit: Fit) -> Any:
    """Runs the first pass, and puts the second pass behind its outputs."""
    replay = Replay(inputs.found, inputs.devices)
    with Undo(lambda: replay.before.restore()) as undo:
        outputs = first_pass(inputs, cut, replay)
        undo.instead(None)
    leaves: Sequence[torch.Tensor | None] = outputs.leaves
    if any(outputs.takes):
        refuse = refuses_another_cut(replay, cut)
        second = SecondPass(inputs, replay, lambda run: fit.run(run, cut, refuse))
        leaves = behind(outputs, inputs, second)
    return outputs.structure(leaves)


def _refuse_distributed(layers: Iterable[torch.nn.Module]) -> None:
    for layer in layers:
        name = type(layer).__name__
        if isinstance(layer, torch.nn.parallel.DistributedDataParallel):
            raise ValueError(
                "rowwise goes inside the module that DistributedDataParallel wraps. "
                f"Got {name} as fn or module. Call rowwise in the module's own forward."
            )
        raise ValueError(
            "rowwise must have its parameters whole on each rank. "
            f"Got {name}, which gathers them while it runs and is not supported. "
            "Use DistributedDataParallel, and call rowwise in the forward of what it wraps."
        )


def _refuse_planning() -> None:
    """Refuses to plan where other ranks may run the module at the same time.

    Raises:
        ValueError: there are other ranks.
    """
    if number_of_processes() > 1:
        raise ValueError(
            'microbatch_size="auto" in rowwise looks at one process. Got a group of '
            f"{number_of_processes()}. Plan the function alone, and pass the size that it finds."
        )


def rowwise(
    fn: Callable[..., Outputs],
    *,
    module: Trained | Iterable[Trained] | None = None,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    check: bool = True,
) -> Rowwise[Outputs]:
    """A function like fn, with the memory of a micro-batch, for losses that need all rows at once.

    Wrap the part of the model that treats each row alone, such as the encoders of a contrastive
    loss. The loss stays outside. It runs once, on the outputs of all rows, so it and its gradient
    do not change. `loss.backward()`, scaler, clipping and optimizer lines stay as they are.

    The forward pass runs fn in micro-batches and keeps only the outputs. The backward pass runs fn
    a second time, one micro-batch after another, with the random numbers and the autocast state of
    the first pass. So fn may hold dropout, and each BatchNorm layer makes one momentum update. If
    memory runs out, the same pass runs again with smaller micro-batches, and the smaller size is
    kept for the module.

    fn runs unchanged where PyTorch records no gradients, and where one micro-batch holds all rows.

    Args:
        fn: a function of `(batch, *shared)`. It returns nested dicts, lists, tuples and
            dataclasses of tensors with one entry per row, or of None. Row i of an output may
            depend on row i of the batch only.
        module: the module, or all modules, whose parameters and buffers fn uses. Trained tensors
            that no module holds may be listed too. None means fn itself, if it is a module.
        microbatch_size: the rows of one forward and backward. `"auto"` or an `Auto` plans the size
            at the first batch. Leave it out if the batch is a `Window`.
        accumulation_steps: the micro-batches per batch, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`.
        check: whether the first call checks, on a few rows, that fn computes each row from that
            row alone. This calls fn about ten times more, once.

    Returns:
        A function of `(batch, *shared)`. Its outputs are those of all rows, in their order. It is
        differentiable once, also with respect to the batch and to the shared tensors. Each
        micro-batch gets the shared tensors whole.

    Raises:
        ValueError: a size is not a positive integer, or two sizes disagree.
        ValueError: when called: tensors have different numbers of rows, or the batch has none.
        ValueError: when called: an output has not one entry per row, depends on other rows, or
            changes its structure between micro-batches.
        ValueError: when called: fn uses a trained tensor that no module holds, uses a graph from
            outside, or checkpoints with `use_reentrant=True`.
        ValueError: when called: a module adds up gradients over ranks.
        TypeError: an output is not a tensor, or an argument has the wrong type.
        MemoryError: not even a micro-batch of one row fits; or the backward pass ran out of memory
            and its micro-batches cannot be cut smaller, because random numbers or statistics
            belong to them.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> encode = rowwise(model, microbatch_size=2)
        >>> z = encode(torch.arange(8.0).reshape(4, 2))
        >>> loss = torch.nn.functional.cross_entropy(z @ z.T, torch.arange(4))
        >>> loss.backward()
        >>> model.weight.grad.shape
        torch.Size([2, 2])
    """
    check_flags(check=check)
    if not callable(fn):
        raise TypeError(
            f"fn must be a function of a batch. Got fn={fn!r}. Pass a module or a function."
        )
    if microbatch_size is not None or accumulation_steps is not None:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
    return Rowwise(fn, module, microbatch_size, accumulation_steps, check)
