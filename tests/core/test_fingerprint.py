"""What a loss does, as text: the same for the same loss made anew, another for another loss."""

import functools
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from virtualbatch.window.fingerprint import fingerprint, owner_of


def squared(x):
    return x * x


def absolute(x):
    return abs(x)


def made(inner=squared, factor=1.0, flag=False, data=()):
    return lambda batch: inner(batch["x"]) * factor if flag or data else inner(batch["x"])


class Mean:
    def __call__(self, x):
        return x.mean()

    def loss(self, x):
        return self(x)


class Sum(Mean):
    pass


SAME = {
    "made anew": (made(), made()),
    "another number": (made(factor=1.0), made(factor=2.0)),
    "another data set": (made(data=[1, 2]), made(data=[3])),
    "methods": (Mean().loss, Mean().loss),
    "partial": (functools.partial(squared, 1.0), functools.partial(squared, 2.0)),
    "decorated": (squared, functools.wraps(squared)(lambda *args: squared(*args))),
}
OTHER = {
    "another function": (squared, absolute),
    "another body": (lambda x: x + 1, lambda x: x - 1),
    "another number in it": (lambda x: x * 1.0, lambda x: x * 2.0),
    "another name in it": (lambda x: x.mean(), lambda x: x.sum()),
    "inside it": (lambda x: (lambda y: y + 1)(x), lambda x: (lambda y: y - 1)(x)),
    "in the closure": (made(squared), made(absolute)),
    "a flag": (made(flag=True), made(flag=False)),
    "objects": (made(Mean()), made(Sum())),
    "methods": (Mean().loss, Sum().loss),
    "partial": (functools.partial(squared), functools.partial(absolute)),
    "defaults": (lambda x, f=squared: f(x), lambda x, f=absolute: f(x)),
}


@pytest.mark.parametrize("pair", SAME.values(), ids=SAME)
def test_the_same_loss(pair):
    assert fingerprint(pair[0]) == fingerprint(pair[1])


@pytest.mark.parametrize("pair", OTHER.values(), ids=OTHER)
def test_another_loss(pair):
    assert fingerprint(pair[0]) != fingerprint(pair[1])


def test_options_count():
    assert fingerprint(squared, None, True) != fingerprint(squared, None, False)
    assert fingerprint(squared, absolute) != fingerprint(absolute, squared)
    assert fingerprint({"a": squared}) != fingerprint({"b": squared})


def test_a_function_in_its_own_closure():
    def loss(x):
        return loss(x[1:]) if x else 0

    assert fingerprint(loss) == fingerprint(loss)


def test_it_is_the_same_in_another_process():
    script = "from tests.core.test_fingerprint import *; print(fingerprint(kinds, made()))"
    printed = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert printed.strip() == fingerprint(kinds, made())


def kinds(x):
    # A set of texts has another order in each process.
    return x in {"mean", "sum", "none", "median"}


def test_what_owns_a_loss_outlives_it():
    owner = owner_of(made())
    gc.collect()
    assert owner == owner_of(made(flag=True)) == owner_of(functools.partial(made()))
    assert owner_of(Mean()) is Mean
    assert owner_of(Mean().loss) is Mean.loss.__code__
