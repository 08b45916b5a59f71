"""The interface by which an engine observes a training step for a certificate."""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from virtualbatch.certify.activations import Activation
from virtualbatch.window.terms import SUM, GivenWeight, weight_terms
from virtualbatch.window.window import Window


def refuse_window(batch: Any, microbatch_size: Any = None) -> None:
    """Raises an error for a batch that is already cut, and for a size that must be planned first.

    Raises:
        ValueError: the batch is a Window, or the size is not an integer.
    """
    if microbatch_size is not None and not isinstance(microbatch_size, numbers.Integral):
        raise ValueError(
            f"certify compares one cut. Got microbatch_size={microbatch_size!r}. "
            "Pass the rows of a micro-batch, such as those that plan found."
        )
    if isinstance(batch, Window):
        raise ValueError(
            "certify cuts the batch itself. Got a Window. "
            "Pass the batch that the window was cut from."
        )


def check_microbatches(rows: Sequence[int]) -> None:
    """Raises an error if there is only one micro-batch, which leaves nothing to compare.

    Args:
        rows: the rows of each micro-batch.

    Raises:
        ValueError: there is only one micro-batch.
    """
    if len(rows) < 2:
        raise ValueError(
            "certify needs a batch that is cut into two micro-batches or more. "
            f"Got {sum(rows)} rows in one. Pass more rows, or a smaller microbatch_size."
        )


# What the mean of each piece was divided by; "sum" if pieces add up; None for rows.
PieceWeights = Sequence[float] | Literal["sum"] | None


def weights_of(weight: GivenWeight, microbatches: Sequence[Any]) -> Callable[[Any], PieceWeights]:
    """Term name -> its weights in the micro-batches, as the user passes them.

    Args:
        weight: as passed to the engine.
        microbatches: arguments of a weight function.
    """
    if not callable(weight):
        same: PieceWeights = weight
        return lambda term: same
    given = [weight_terms(weight(microbatch)) for microbatch in microbatches]

    def of(term: Any) -> PieceWeights:
        first = given[0][term]
        if first is None or isinstance(first, str):
            return None if first is None else SUM
        return [float(terms[term]) for terms in given]

    return of


class Observed(NamedTuple):
    """One run of the loss and its gradient.

    Fields:
        terms: term name -> its value.
        gradients: parameter name -> its gradient, of the parameter's shape; None if the loss does
            not depend on the parameter.
        state: name -> state of layers after the run, such as running means.
    """

    terms: Mapping[Any, float]
    gradients: Mapping[str, np.ndarray | None]
    state: Mapping[str, np.ndarray]


class TrainingStep(ABC):
    """A training step of the user; no method changes its state.

    Attributes:
        rows: rows of the batch.
        pieces: row numbers of each micro-batch.
        epsilon: epsilon of the dtype in which gradients are summed.
        narrowest: epsilon of the narrowest dtype among the values inside, the weights and the
            buffer, as far as they are meant to be exact.
        leaves: expression -> array of the batch, with rows on its first axis.
        parameters: parameter name -> value.
        narrow: places that sum in half precision, in words.
        notes: how the step is observed, in sentences.
        place: the loss in words, for use when no line of it is known.
        weight_takes: the arguments of a weight function, as code.
        weighs_itself: whether the engine finds the weights of a loss by itself.
        way_out: what to do if rows are coupled.
    """

    rows: int
    pieces: Sequence[np.ndarray]
    epsilon: float
    narrowest: float
    leaves: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    narrow: Sequence[str]
    notes: Sequence[str]
    place = "loss_fn"
    weight_takes = "batch"
    weighs_itself = False
    way_out = "Wrap what comes before this line in rowwise: what follows then sees all rows."

    @abstractmethod
    def accumulated(self) -> Observed:
        """Runs the whole batch with the engine, in micro-batches. The only term is the loss."""

    @abstractmethod
    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """Runs some rows in one piece, without virtualbatch. Each row keeps its random numbers.

        Args:
            rows: row numbers.
            term: the only term to differentiate; None for the sum of all terms.
            again: whether to run twice and observe the second run, which starts from the state
                that the first one left.
        """

    @abstractmethod
    def weights(self) -> Callable[[Any], PieceWeights]:
        """Term name -> the weights of the pieces, as the user passes them."""

    @abstractmethod
    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """The values that the loss computes from some rows, in order; see `alone`."""

    def places(self, place: str, terms: Collection[Any]) -> Mapping[Any, str]:
        """Term name -> its place in words, for the terms that can be differentiated alone.

        Args:
            place: where the values of rows are reduced to one number.
            terms: the terms of the run on the whole batch.
        """
        return {t: place if len(terms) == 1 else f"term {t!r}, {place}" for t in terms}

    def accumulated_term(self, term: Any) -> Observed:
        """Like `accumulated`, for one term; only for an engine that `weighs_itself`."""
        raise NotImplementedError(term)
