"""Dataclasses with `__post_init__`: made anew for each micro-batch, or refused."""

import dataclasses

import numpy as np
import pytest

from virtualbatch.window.tree import builder

X = np.arange(8.0).reshape(4, 2)


def cut(batch, rows):
    found = []
    build = builder(batch, "batch", found)
    return build([leaf[:rows] if hasattr(leaf, "shape") else leaf for _, leaf in found])


@dataclasses.dataclass(frozen=True)
class Counted:
    x: object
    scale: float = 2.0
    n: int = dataclasses.field(init=False)
    mask: object = dataclasses.field(init=False)
    _: dataclasses.KW_ONLY
    parts: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "n", len(self.x))
        object.__setattr__(self, "mask", self.x > 3)


def test_what_a_constructor_counts_is_that_of_the_micro_batch():
    found = cut(Counted(X, 3.0, parts={"y": X}), 2)
    assert (found.n, found.scale, len(found.x), len(found.parts["y"])) == (2, 3.0, 2, 2)
    assert found.mask.tolist() == [[False, False], [False, False]]


def test_an_instance_that_is_not_cut_is_not_made_anew():
    class Broken(Counted):
        def __post_init__(self):
            raise AssertionError

    batch = object.__new__(Broken)
    for name, value in {"x": X, "scale": 1.0, "parts": {}}.items():
        object.__setattr__(batch, name, value)
    found = []
    builder(batch, "batch", found)
    assert [path for path, _ in found] == ["batch.x", "batch.scale"]


def test_it_is_tried_once():
    tries = []

    @dataclasses.dataclass
    class Heard:
        x: object

        def __post_init__(self):
            tries.append(len(self.x))

    found = []
    build = builder(Heard(X), "batch", found)
    for rows in (1, 2):
        build([leaf[:rows] for _, leaf in found])
    assert tries == [4, 4, 1, 2]


@dataclasses.dataclass
class Normalised:
    x: object

    def __post_init__(self):
        self.x = self.x / self.x.sum()


@dataclasses.dataclass
class Same:
    x: object

    def __post_init__(self):
        self.x = self.x / 1


@dataclasses.dataclass
class InPlace:
    x: object

    def __post_init__(self):
        self.x /= self.x.sum()


@dataclasses.dataclass
class InPlaceInside:
    parts: dict

    def __post_init__(self):
        self.parts["x"] /= 2


@dataclasses.dataclass
class Grown:
    x: object
    steps: list

    def __post_init__(self):
        self.steps = [*self.steps, 1]


@dataclasses.dataclass
class Given:
    x: object
    scale: dataclasses.InitVar[float]
    scaled: object = dataclasses.field(init=False)

    def __post_init__(self, scale):
        self.scaled = scale


def changed():
    batch = Counted(X)
    object.__setattr__(batch, "n", 7)
    return batch


REFUSED = {
    "normalised": (lambda: Normalised(X), r"Got another \.x from the fields.*for Normalised"),
    "equal but another object": (lambda: Same(X), r"another \.x"),
    "in place": (lambda: InPlace(X.copy()), r"read-only, for InPlace\. Change arrays before"),
    "in place, inside": (lambda: InPlaceInside({"x": X.copy()}), r"read-only"),
    "a list that grows": (lambda: Grown(X, []), r"another \.steps"),
    "an argument that is not kept": (lambda: Given(X, 2.0), r"InitVar 'scale'"),
    "a field that was changed later": (changed, r"another \.n from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_that_comes_out_different_is_refused(name):
    make, text = REFUSED[name]
    batch = make()
    before = repr(batch)
    with pytest.raises(ValueError, match=text):
        cut(batch, 2)
    assert repr(batch) == before
