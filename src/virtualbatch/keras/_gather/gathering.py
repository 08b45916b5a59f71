"""Which predictions of a model are gathered, and why."""

from collections.abc import Sequence
from typing import Any, NamedTuple

# Why a loss needs all rows, in words.
NUMBER = "returns one number"
NO_ROWS = "returns no value per row"
COMPARES = "compares rows"
UNCUT = "does not run on a few rows"


class Coupled(NamedTuple):
    """A loss that needs all rows.

    Fields:
        name: the name of the loss.
        why: one of the constants above.
        differs: the largest change of a row's value without the other rows, relative to the
            largest value; 0 if it was not measured.
    """

    name: str
    why: str
    differs: float = 0.0


class Gathering(NamedTuple):
    """Which losses of a window see all rows, and which predictions are gathered.

    Fields:
        losses: for each compiled loss, in the order of `CompileLoss`, whether it sees all rows.
            None if all do: for an overridden `compute_loss`, or `gather=True`.
        outputs: for each leaf of the predictions, whether it is gathered; None if all are.
    """

    losses: Sequence[bool] | None
    outputs: Sequence[bool] | None

    def takes(self, output: int) -> bool:
        """Whether the leaf with that index is gathered."""
        return self.outputs is None or self.outputs[output]

    @property
    def takes_all(self) -> bool:
        """Whether every output is gathered."""
        return self.outputs is None or all(self.outputs)


EVERYTHING = Gathering(None, None)


class Found(NamedTuple):
    """What is known about a model's loss.

    Fields:
        coupled: the compiled losses that need all rows.
        gathering: what is gathered; None if nothing is.
        runs: names of layers that an overridden `compute_loss` runs itself, on all rows.
    """

    coupled: Sequence[Coupled]
    gathering: Gathering | None
    runs: Sequence[str] = ()


NOTHING = Found([], None)


def chosen_of(leaves: Sequence[Any], gathering: Gathering) -> list[Any]:
    """Those leaves of predictions that are gathered."""
    return [leaf for k, leaf in enumerate(leaves) if gathering.takes(k)]
