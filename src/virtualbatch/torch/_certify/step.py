"""A PyTorch training step as `certify` observes it: uncut and cut, in float64 where possible."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from virtualbatch.certify.activations import Activation
from virtualbatch.certify.step import Observed, PieceWeights, TrainingStep, weights_of
from virtualbatch.torch._batch import read
from virtualbatch.torch._certify.activations import recorded
from virtualbatch.torch._certify.randomness import RowwiseRandom
from virtualbatch.torch._conclusion import keep
from virtualbatch.torch._faults import refuse_shared_graph
from virtualbatch.torch._grad_watch import check_recording
from virtualbatch.torch._leaves import refuse_unheld_parameter
from virtualbatch.torch._loss import checked_terms
from virtualbatch.torch._microbatch import known_rows, on_device
from virtualbatch.torch._modules import inventory
from virtualbatch.torch._state import versions_of
from virtualbatch.torch._undo import Undo
from virtualbatch.torch._window import Program
from virtualbatch.window.terms import loss_and_aux, of_part, weight_terms

_HALF = {torch.float16, torch.bfloat16}


class TorchTrainingStep(TrainingStep):
    """See `virtualbatch.certify.step.TrainingStep`.

    Args:
        program: loss, weight and modules.
        batch: a batch, not a Window, in the dtype to observe.
        microbatch_size: checked rows of one micro-batch, or None.
        accumulation_steps: checked micro-batches per window, or None.
        state: the state of the modules before.
    """

    def __init__(
        self,
        program: Program,
        batch: Any,
        microbatch_size: int | None,
        accumulation_steps: int | None,
        state: "LayerState",
    ):
        self._program = program
        self._state = state
        self._roots = program.found.roots
        whole = read(batch).whole
        self.rows = known_rows(whole)
        # A loss function may change its rows in place, but the next run needs the original rows.
        pair = read((batch, torch.arange(self.rows))).protected()
        self._whole = pair.whole
        self._cut = pair.cut(microbatch_size, accumulation_steps)
        self.pieces = [piece.get()[1].numpy() for piece in self._cut]
        self.leaves = {path: as_array(leaf) for path, leaf in whole.tensors()}
        self._names = _parameter_names(program)
        self.parameters = {name: as_array(p) for name, p in self._names.items()}
        notes = []
        self._random = RowwiseRandom(self.rows)
        with self._random:
            self._random.probe()
            self._forward(self.pieces[0])
            self._random.keep()
            loss = self._forward(np.arange(self.rows))
            told = self._random.learn(len(self.pieces[0]))
        if self._random.draws:
            notes.append(
                "Each row kept its random numbers, so every cut drew the same ones."
                if told
                else "Randomness was replaced by constants, because its numbers do not belong to "
                "rows."
            )
        terms = checked_terms(loss).values()
        _refuse_described(terms)
        refuse_unheld_parameter(terms, program.found.parameters)
        dtype = next(iter(terms)).dtype
        self.epsilon = torch.finfo(torch.float32 if dtype in _HALF else dtype).eps
        notes.append(f"Compared in {_name(dtype)}.")
        self.notes = notes
        dtypes = self._weight_dtypes()
        self.narrow = [f"what weight returns ({_name(dtype)})" for dtype in dtypes & _HALF]
        wide = [dtype for dtype in dtypes if dtype not in _HALF]
        self.narrowest = max(torch.finfo(x).eps for x in [dtype, *wide, *self._random.dtypes])

    def accumulated(self) -> Observed:
        """See `TrainingStep`."""
        program = self._program
        seen = program._replace(
            loss_fn=lambda pair: self._chosen(pair)(pair[0]),
            weight=of_part(self._program.weight, itemgetter(0)),
            # The caller has refused what certify must refuse. A later call of backward may refuse
            # more.
            found=inventory(self._roots, hands_over=True),
        )
        self._fresh()
        with self._random:
            found = seen.run(self._cut, seen.shares(self._cut), keep)
        loss = found[0] if program.has_aux else found
        return self._observed({"loss": float(loss.detach())})

    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """See `TrainingStep`."""
        self._fresh()
        with self._random:
            if again:
                self._forward(rows, fresh=False)
            terms = checked_terms(self._forward(rows, fresh=False))
            chosen = list(terms.values()) if term is None else [terms[term]]
            total = sum(chosen[1:], chosen[0])
            if total.requires_grad:
                try:
                    with torch.autocast(total.device.type, enabled=False):
                        total.backward()
                except RuntimeError as error:
                    refuse_shared_graph(error)
                    raise
        return self._observed({name: float(value.detach()) for name, value in terms.items()})

    def weights(self) -> Callable[[Any], PieceWeights]:
        """See `TrainingStep`."""
        microbatches = [piece.get()[0] for piece in self._cut]
        with torch.no_grad():
            return weights_of(self._program.weight, microbatches)

    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """See `TrainingStep`."""
        self._fresh()
        layers = [layer for root in self._roots for layer in root.modules()]
        names = {id(layer): name for root in self._roots for name, layer in root.named_modules()}
        with self._random:
            if again:
                self._forward(rows, fresh=False)
            return recorded(lambda: self._forward(rows, fresh=False), layers, names)

    def _chosen(self, pair: Any) -> Any:
        self._random.choose(pair[1])
        return self._program.loss_fn

    def _forward(self, rows: np.ndarray, fresh: bool = True) -> Any:
        if fresh:
            self._fresh()
        device = self._program.found.accelerator
        piece = self._whole.some(np.ascontiguousarray(rows).tolist())
        batch, _ = (piece if device is None else on_device(piece, device)).get()
        self._random.choose(rows)
        records = torch.is_grad_enabled()
        result = self._program.loss_fn(batch)
        check_recording(records)
        return loss_and_aux(result, self._program.has_aux)[0]

    def _fresh(self) -> None:
        self._state.restore()
        for parameter in self._names.values():
            parameter.grad = None

    def _observed(self, terms: dict[Any, float]) -> Observed:
        gradients = {
            name: None if p.grad is None else as_array(p.grad) for name, p in self._names.items()
        }
        state = {
            name: as_array(buffer)
            for root in self._roots
            for name, buffer in root.named_buffers()
            if buffer.is_floating_point()
        }
        return Observed(terms, gradients, state)

    def _weight_dtypes(self) -> set[torch.dtype]:
        """Floating dtypes of the values that `weight` returns."""
        weight = self._program.weight
        if not callable(weight):
            return set()
        values = weight_terms(weight(self._cut[0].get()[0])).values()
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        return {value.dtype for value in tensors if value.is_floating_point()}


class LayerState:
    """Attributes and buffers of all layers, as they are now.

    Args:
        roots: modules.

    Attributes:
        layers: all layers, each once.
    """

    def __init__(self, roots: Sequence[torch.nn.Module]):
        layers = {id(layer): layer for root in roots for layer in root.modules()}
        self.layers = list(layers.values())
        self._layers = [(layer, dict(vars(layer)), dict(layer._buffers)) for layer in self.layers]
        self._values = [
            (buffer, buffer.detach().clone())
            for _, _, buffers in self._layers
            for buffer in buffers.values()
            if buffer is not None
        ]
        self._versions = versions_of([buffer for buffer, _ in self._values])

    def restore(self) -> None:
        """Puts everything back: the same objects with the same values."""
        for layer, attributes, buffers in self._layers:
            vars(layer).clear()
            vars(layer).update(attributes)
            layer._buffers.clear()
            layer._buffers.update(buffers)
        with torch.no_grad(), self._versions:
            for buffer, value in self._values:
                buffer.copy_(value)


@contextmanager
def widened(roots: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside the context, parameters and buffers are the same objects, but in float64."""
    tensors = {
        id(tensor): tensor
        for root in roots
        for tensor in [*root.parameters(), *root.buffers()]
        if tensor.is_floating_point()
    }
    before = {key: tensor.data for key, tensor in tensors.items()}
    default = torch.get_default_dtype()

    def narrow() -> None:
        torch.set_default_dtype(default)
        for key, tensor in tensors.items():
            tensor.data = before[key]

    with Undo(narrow):
        for tensor in tensors.values():
            tensor.data = tensor.data.double()
        # Tensors that a loss function creates itself, such as zeros, must be as wide.
        torch.set_default_dtype(torch.float64)
        yield


def wide_batch(batch: Any) -> Any:
    """The batch with its floating tensors in float64."""
    return read(batch).whole.mapped(lambda x: x.double() if x.is_floating_point() else x)


def _parameter_names(program: Program) -> dict[str, torch.nn.Parameter]:
    roots = program.found.roots
    names: dict[int, str] = {}
    for index, root in enumerate(roots):
        prefix = f"module[{index}]." if len(roots) > 1 else ""
        for name, parameter in root.named_parameters():
            names.setdefault(id(parameter), prefix + name)
    return {names[id(parameter)]: parameter for parameter in program.found.parameters}


def _refuse_described(losses: Iterable[torch.Tensor]) -> None:
    if any(loss.is_meta for loss in losses):
        raise ValueError(
            "certify compares values. Got a loss on the device meta, which has none. Compute it "
            "on a real device, such as cpu."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as an array on the host, in float64 if it is floating."""
    found = tensor.detach().cpu()
    found = found.to_dense() if found.is_sparse else found
    if found.is_floating_point():
        found = found.double()
    return np.array(found.numpy())
