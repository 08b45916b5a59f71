"""A call of a public verb before it is made, and what may be done to it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple, Protocol

import numpy as np

# Rows and columns of the batch that a call starts from.
ROWS, COLUMNS = 6, 3


# What a call may raise; whoever stops a run is not among them.
ANY_ERROR = (Exception,)


class UsersError(Exception):
    """What a user's own function raises. It must arrive as it was raised."""


class NoOracle(Exception):
    """There is no uncut batch that tells what is right."""


class Ops(Protocol):
    """What the user's functions need of a framework."""

    def array(self, values: np.ndarray) -> Any:
        """An array of the framework."""

    def mean_of(self, leaf: Any, trained: Any) -> Any:
        """A mean over rows that depends on what is trained, in its dtype."""

    def constant(self, trained: Any) -> Any:
        """A scalar that depends on what is trained, and on no row."""

    def cast(self, value: Any, dtype: str) -> Any:
        """The same in another dtype."""

    def rows(self, leaf: Any) -> Any:
        """The mean of each row."""

    def largest(self, leaf: Any) -> Any:
        """The largest entry."""

    def joined(self, leaves: Any) -> Any:
        """One array of the rows of several."""


@dataclass
class Call:
    """A call of a public verb.

    Attributes:
        verb: its name.
        ops: the framework.
        batch: what it is given as a batch.
        loss: what it is given as a loss function; None where the verb takes none.
        trained: a module, variables, parameters or a Keras model.
        options: keyword arguments.
        allowed: names of the options that the verb has.
        aux_is_judged: whether the aux of the uncut batch is that of the window.
        is_judged: whether what the uncut batch gives is the right answer.
        is_empty: whether the weight says that there are no rows: no loss, and no gradient.
        weights: what the loss really uses, where `trained` is no longer that.
        compiled: whether the call is inside `jit` or `tf.function`, where nothing is tried.
        keeps_state: whether the user's own functions leave the state alone.
        eager: whether Keras runs without compiling.
        faults: names of what was done to it.
    """

    verb: str
    ops: Any
    batch: Any
    loss: Any
    trained: Any
    options: dict[str, Any]
    allowed: frozenset[str]
    aux_is_judged: bool = True
    is_judged: bool = True
    is_empty: bool = False
    weights: Any = None
    compiled: bool = False
    keeps_state: bool = True
    eager: bool = True
    faults: list[str] = field(default_factory=list)


class Fault(NamedTuple):
    """A change of a call.

    Fields:
        name: what a report calls it.
        part: what it changes: "batch", "loss", "trained", or the name of an option.
        change: (call, random) -> None.
    """

    name: str
    part: str
    change: Callable[[Call, Random], None]

    def fits(self, call: Call) -> bool:
        """Whether the verb of a call takes such a part."""
        if self.part == "loss":
            return call.loss is not None
        if self.part == "batch":
            return call.batch is not None
        return self.part == "trained" or self.part in call.allowed


class Result(NamedTuple):
    """What a call gave, in NumPy.

    Fields:
        loss: the loss; None where there is nothing to compare.
        gradients: of what is trained, None where there is none.
        aux: leaves of aux.
        traced: what the framework raises where it makes a program of the user's function; None if
            nothing is, or nothing is known of it.
    """

    loss: Any
    gradients: list[Any]
    aux: list[Any]
    traced: Exception | None = None


class Engine(Protocol):
    """An engine whose verbs are called."""

    name: str
    verbs: tuple[str, ...]
    faults: list[Fault]

    def call(self, verb: str, random: Random) -> Call:
        """A small call that is right."""

    def uncut(self, call: Call) -> Result:
        """What the framework alone gives for the whole batch."""

    def run(self, call: Call) -> Result | None:
        """Makes the call; None where nothing is to be compared."""

    def state(self, call: Call) -> dict[str, Any]:
        """What must be as it was after an error."""

    def checked(self, call: Call) -> None:
        """Makes the call, or `certify`, where a first window tries the law."""
