"""What is remembered about some variables, for as long as they live."""

import weakref
from typing import Any, NamedTuple

import tensorflow as tf

from virtualbatch.certify.proven import Proven
from virtualbatch.plan.auto import Auto
from virtualbatch.window.not_finite import LossWatch


class Remembered(NamedTuple):
    """What is remembered about some variables.

    Fields:
        proven: the losses that were tried with the variables.
        sizes: the sizes of calls with the variables.
        losses: receives the losses of windows with the variables.
    """

    proven: Proven
    sizes: Auto
    losses: LossWatch


# Keys are the identity of the first variable: a variable itself cannot be hashed.
_REMEMBERED: dict[int, Remembered] = {}


def remembered(variables: Any) -> Remembered:
    """What is remembered about some variables. Without variables nothing is remembered."""
    owner = next(iter(tf.nest.flatten(variables)), None)
    if owner is None:
        return Remembered(Proven(), Auto(), LossWatch())
    if id(owner) not in _REMEMBERED:
        _REMEMBERED[id(owner)] = Remembered(Proven(), Auto(), LossWatch())
        weakref.finalize(owner, _REMEMBERED.pop, id(owner), None)
    return _REMEMBERED[id(owner)]
