"""What an engine observes of a training step so that the step can be certified."""

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from virtualbatch.certify.activations import Activation
from virtualbatch.window.terms import SUM, GivenWeight, weight_terms
from virtualbatch.window.window import Window


def refuse_window(batch: Any, microbatch_size: Any = None) -> None:
    """Refuses a batch that is cut already, and a size that is still to be planned.

    Raises:
        ValueError: the batch is a Window, or the size no number.
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
    """Refuses a cut that leaves nothing to compare.

    Args:
        rows: of each micro-batch.

    Raises:
        ValueError: there is only one.
    """
    if len(rows) < 2:
        raise ValueError(
            "certify needs a batch that is cut into two micro-batches or more. "
            f"Got {sum(rows)} rows in one. Pass more rows, or a smaller microbatch_size."
        )


# Of each piece what its mean was divided by; "sum" where pieces add up; None for rows.
PieceWeights = Sequence[float] | Literal["sum"] | None


def weights_of(weight: GivenWeight, microbatches: Sequence[Any]) -> Callable[[Any], PieceWeights]:
    """Term name -> its weights in micro-batches, as the user gives them.

    Args:
        weight: as the engine is given it.
        microbatches: what a weight function is called with.
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
        gradients: parameter name -> its gradient, of the parameter's shape; None where the loss
            does not reach the parameter.
        state: name -> value of what layers keep, such as running means, after the run.
    """

    terms: Mapping[Any, float]
    gradients: Mapping[str, np.ndarray | None]
    state: Mapping[str, np.ndarray]


class TrainingStep(ABC):
    """A training step of the user's; every method leaves it as it was.

    Attributes:
        rows: rows of the batch.
        pieces: row numbers of each micro-batch.
        epsilon: of the dtype that gradients are summed in.
        narrowest: of the narrowest dtype of the values inside, of weights and of a buffer, as far
            as those are meant to be exact.
        leaves: expression -> array of the batch, with rows on its first axis.
        parameters: parameter name -> value.
        narrow: what is summed in half precision, in words, each a place.
        notes: how it is observed, in sentences.
        place: the loss in words, where no line of it is known.
        weight_takes: the arguments of a weight function, as code.
        weighs_itself: whether the engine finds the weights of a loss by itself.
        way_out: what to do where rows are coupled.
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
        """The whole batch by the engine, in micro-batches; one term, the loss."""

    @abstractmethod
    def alone(self, rows: np.ndarray, term: Any = None, again: bool = False) -> Observed:
        """Some rows in one piece, by the framework alone, with the same random numbers per row.

        Args:
            rows: row numbers.
            term: the only term to differentiate; None for their sum.
            again: whether to run twice, the second time from the state that the first one left,
                and to observe the second run.
        """

    @abstractmethod
    def weights(self) -> Callable[[Any], PieceWeights]:
        """Term name -> the weights of the pieces as the user gives them."""

    @abstractmethod
    def activations(self, rows: np.ndarray, again: bool = False) -> list[Activation]:
        """The values that the loss computes of some rows, in order; see `alone`."""

    def places(self, place: str, terms: Collection[Any]) -> Mapping[Any, str]:
        """Term name -> where it is, in words: the terms that can be differentiated alone.

        Args:
            place: where values of rows become one number.
            terms: the terms that the whole batch was observed with.
        """
        return {t: place if len(terms) == 1 else f"term {t!r}, {place}" for t in terms}

    def accumulated_term(self, term: Any) -> Observed:
        """The whole batch by the engine, one of its terms; of an engine that `weighs_itself`."""
        raise NotImplementedError(term)
