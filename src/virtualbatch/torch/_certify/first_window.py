"""The check of a loss at its first window: PyTorch's part of `certify.first_window`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from virtualbatch.certify.certificate import Certificate
from virtualbatch.certify.first_window import NO_GRADIENT, conclude, prove
from virtualbatch.certify.of_signal import raise_if_of_signal
from virtualbatch.certify.proven import IN_STEP, NO_ROWS
from virtualbatch.certify.randomness import HostRandom
from virtualbatch.certify.trial import Distance, Trial, UntriedError, rows_of_part
from virtualbatch.plan.out_of_memory import in_words
from virtualbatch.torch._batch import ReadBatch
from virtualbatch.torch._certify.certificate import certificate, uncompiled
from virtualbatch.torch._certify.heard_dtypes import heard_dtypes
from virtualbatch.torch._certify.step import LayerState, as_array
from virtualbatch.torch._gradients import WindowGradients
from virtualbatch.torch._leaves import refuse_unheld_parameter
from virtualbatch.torch._loss import checked_terms
from virtualbatch.torch._microbatch import Microbatch, known_rows, on_device
from virtualbatch.torch._plan.memory import ERRORS
from virtualbatch.torch._random import RandomState
from virtualbatch.torch._remembered import remembered
from virtualbatch.torch._state import LARGEST_COPIED
from virtualbatch.torch._undo import Undo, all_or_nothing
from virtualbatch.torch._window import Program
from virtualbatch.window.shares import Shares
from virtualbatch.window.terms import loss_and_aux

# Small micro-batches are joined until they have at least so many rows.
_ENOUGH_ROWS = 32

# Layers that draw numbers or couple rows in training mode, on purpose.
_RANDOM_OR_COUPLED = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)


def prove_first_window(
    program: Program, batch: ReadBatch, cut: Sequence[Microbatch], shares: Shares
) -> Sequence[Microbatch]:
    """Tries the law on rows of a batch, if its loss has not been tried with the module before.

    Args:
        program: the loss, its weight and its modules.
        batch: the batch or Window.
        cut: the micro-batches of the window.
        shares: the shares of the micro-batches.

    Returns:
        The micro-batches to run. They hand out clones if the loss changes its rows in place.

    Raises:
        ValueError: micro-batches of this loss do not add up to their batch, or it reaches a
            parameter that no module holds.
    """
    known = remembered(program.found.owner).proven
    if not batch.can_be_cut:
        known.tell_once(program.loss_fn, program.weight, NO_ROWS)
        return cut
    source = source_of(batch.given)
    lacking = shares.empty_and_full()
    kinds = [(x.dtype, x.dim()) if isinstance(x, torch.Tensor) else None for x in source.leaves]
    structure = (program.has_aux, source.places, tuple(kinds), len(cut) == 1, lacking is None)
    seen = known.seen(program.loss_fn, program.weight, structure)
    if seen is None:
        trial = TorchTrial(program, source, [known_rows(piece) for piece in cut])
        if lacking is not None and not batch.is_window:
            trial.empty, trial.full = (rows_of_part(trial.sizes, k) for k in lacking)
        reason: str | None = None
        with untouched(program) as layers:
            if len(cut) == 1:
                trial.look()
            else:
                reason = tried(prove, trial, layers)
        conclude(known, program.loss_fn, program.weight, structure, trial, reason)
        seen = trial.seen
    if seen.group > 1:
        seen.check_sizes([known_rows(piece) for piece in cut])
    return [microbatch.protected() for microbatch in cut] if seen.writes_rows else cut


def source_of(given: Sequence[Microbatch]) -> Microbatch:
    """The rows to try the law on. Small micro-batches of a Window are joined.

    The rows of one small micro-batch may weigh the same by chance. Then they would show nothing.
    """
    largest = max(given, key=known_rows)
    like = _shapes(largest)
    alike: list[Microbatch] = []
    for microbatch in given:
        if sum(map(known_rows, alike)) < _ENOUGH_ROWS and _shapes(microbatch) == like:
            alike.append(microbatch)
    if len(alike) < 2:
        return largest
    leaves = [
        torch.cat(column) if isinstance(column[0], torch.Tensor) else column[0]
        for column in zip(*(microbatch.leaves for microbatch in alike), strict=True)
    ]
    return largest._replace(rows=sum(map(known_rows, alike)), leaves=leaves, given=None)


def _shapes(microbatch: Microbatch) -> tuple[Any, ...]:
    """A key that agrees for micro-batches whose rows can be joined; never for lists of rows."""
    leaves = [
        (x.dtype, x.device, x.shape[1:])
        if isinstance(x, torch.Tensor)
        else x
        if isinstance(x, str | int | float | None)
        else id(x)
        for x in microbatch.leaves
    ]
    return (microbatch.places, *leaves)


def tell_untried(program: Program) -> None:
    """Logs once that a loss cannot be tried with modules that gather parameters."""
    remembered(program.found.owner).proven.tell_once(program.loss_fn, program.weight, IN_STEP)


def tried(
    prove: Callable[["TorchTrial", Callable[[Exception], str], bool], str | None],
    trial: "TorchTrial",
    layers: LayerState,
) -> str | None:
    """Tries the law with layers in evaluation mode, then again with more of them in training mode.

    Args:
        prove: (trial, how an error is put in words, whether another try follows) -> why the law
            could not be tried, or None.
        trial: the loss and the rows to try it on.
        layers: the state of the layers before.

    Returns:
        Why the law could not be tried; None if it was.
    """
    reason: str | None = None
    # Some models return no loss in evaluation mode. So the second try only silences the layers
    # that are random or couple rows on purpose.
    for again, is_quiet in ((True, is_not_recurrent), (False, _is_random_or_coupled)):
        layers.restore()
        for layer in layers.layers:
            layer.training = layer.training and not is_quiet(layer)
        reason = prove(trial, lambda error: in_words(error, ERRORS), again)
        if reason is None or reason == NO_GRADIENT:
            break
    return reason


def is_not_recurrent(layer: torch.nn.Module) -> bool:
    """Whether a layer can be differentiated in evaluation mode."""
    # cuDNN has no backward pass in evaluation mode.
    return not isinstance(layer, torch.nn.RNNBase)


def _is_random_or_coupled(layer: torch.nn.Module) -> bool:
    return isinstance(layer, _RANDOM_OR_COUPLED)


@contextmanager
def untouched(program: Program) -> Iterator[LayerState]:
    """Puts back layers, random states and parameters. Inside, compiled modules run uncompiled."""
    layers, drawn = LayerState(program.found.roots), RandomState(program.found.accelerator)
    parameters = _copied([p for root in program.found.roots for p in root.parameters()])
    host = HostRandom()

    @torch.no_grad()
    def put_back() -> None:
        layers.restore()
        drawn.restore()
        host.restore()
        for parameter, version, value in parameters:
            if parameter._version != version:
                parameter.copy_(value)

    with Undo(put_back), uncompiled():
        yield layers


def _copied(parameters: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, int, torch.Tensor]]:
    """Parameters with their versions and copies, in case the loss writes to parameters.

    Returns:
        Nothing if the parameters are too large to copy.
    """
    if sum(x.numel() * x.element_size() for x in parameters) > LARGEST_COPIED:
        return []
    return [(x, x._version, x.detach().clone()) for x in parameters]


class TorchTrial(Trial):
    """See `virtualbatch.certify.trial.Trial`.

    Args:
        program: the loss, its weight and its modules.
        source: the rows to choose from.
        sizes: the rows of each micro-batch of the window.
        dtypes: dtypes that the loss is known to use, in addition to those that are observed.
    """

    def __init__(
        self,
        program: Program,
        source: Microbatch,
        sizes: Sequence[int],
        dtypes: Iterable[torch.dtype] = (),
    ):
        self.rows = known_rows(source)
        self.sizes = sizes
        self.width = sum(x[0].numel() for _, x in source.tensors())
        self.program = program
        self._source = source
        self.dtypes = set(dtypes)

    def look(self) -> None:
        """Runs the loss on one row, only to see whether it changes its rows in place."""
        try:
            with torch.no_grad():
                self._terms(self.some([0]))
        except Exception as error:  # the window itself will tell what is wrong
            raise_if_of_signal(error)

    def leaves(self, rows: Sequence[int]) -> Mapping[str, np.ndarray]:
        """See `Trial`."""
        return {place: as_array(leaf) for place, leaf in self._source.some(rows).tensors()}

    def distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        """See `Trial`. The three gradients are added in one buffer, so none is kept alone."""
        return all_or_nothing(partial(self._distance, a, b))

    def _distance(self, a: Sequence[int], b: Sequence[int]) -> Distance | None:
        program = self.program
        parts = [self.some(rows) for rows in (a, [*a, *b], b)]
        shares = program.shares([parts[0], parts[2]])
        drawn, of_host = RandomState(program.found.accelerator), HostRandom()
        gradients = WindowGradients(program.found.parameters, program.backward_fn)
        losses: list[Mapping[Any, torch.Tensor]] = []
        sizes = []
        with Undo(gradients.restore):
            gradients.start()
            for k, part in enumerate(parts):
                losses.append(self._terms(part))
                if k == 0:
                    refuse_unheld_parameter(losses[0].values(), program.found.parameters)
                # The first part, minus the whole, plus the second part.
                factors = [-1.0] * len(losses[k]) if k == 1 else shares.of(losses[k], k // 2)
                gradients.add(losses[k].values(), factors)
                sizes.append(_largest(gradients.sums()))
        if of_host.has_moved():
            raise UntriedError("it draws random numbers by Python or NumPy")
        if drawn.has_moved():
            return None
        share = shares.of_rows_or_term()
        values = [{name: float(x.detach()) for name, x in terms.items()} for terms in losses]
        constant = {
            name: value
            for name, value in values[1].items()
            if not any(terms[name].requires_grad for terms in losses)
        }
        return Distance.of(sizes, share, values, constant, self.epsilon(losses[0].values()))

    def weighed(self, a: Sequence[int], b: Sequence[int]) -> Sequence[float]:
        """The share of each of two parts in their union."""
        shares = self.program.shares([self.some(a), self.some(b)])
        return shares.of_rows_or_term()

    def weights_of_rows(self) -> list[float]:
        """The weight of each row alone."""
        rows = [self.some([row]) for row in range(self.rows)]
        return self.program.shares(rows).of_rows_or_term()

    def _terms(self, part: Microbatch) -> dict[Any, torch.Tensor]:
        with heard_dtypes(self.dtypes):
            loss, _ = loss_and_aux(self.program.loss_fn(part.get()), self.program.has_aux)
        if any(tensor._version for _, tensor in part.tensors()):
            self.seen = self.seen._replace(writes_rows=True)
        return checked_terms(loss)

    def certificate(self, rows: Sequence[int], size: int) -> Certificate:
        """See `Trial`."""
        some = self.some(rows)
        return certificate(self.program, some.build(some.leaves), size, None)

    def some(self, rows: Sequence[int]) -> Microbatch:
        found, device = self._source.some(rows), self.program.found.accelerator
        return found if device is None else on_device(found, device)

    def epsilon(self, terms: Iterable[torch.Tensor]) -> float:
        """The epsilon of the narrowest dtype that is known to be used."""
        tensors = [x for x in (*self.program.found.parameters, *terms) if x.is_floating_point()]
        dtypes = self.dtypes | {x.dtype for x in tensors}
        for device in {x.device.type for x in tensors}:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                dtypes.add(torch.get_autocast_dtype(device))
        return max(torch.finfo(dtype).eps for dtype in dtypes)


def _largest(gradients: Sequence[torch.Tensor]) -> float:
    """The largest number in some gradients; NaN if one is not a number."""
    dense = [x.coalesce().values() if x.is_sparse else x for x in gradients]
    norms = [torch.linalg.vector_norm(x.detach(), float("inf")) for x in dense if x.numel()]
    return float(torch.stack([x.to("cpu", torch.float64) for x in norms]).max()) if norms else 0.0
