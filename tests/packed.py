"""Ragged rows and losses of them that every framework can run, safe to pack and not."""

from typing import Any, NamedTuple

import numpy as np

ROWS, LENGTH, WORDS, WIDTH = 24, 16, 11, 4
# Numbers that meet in one entry of a gradient: tokens, each with all others of its row.
SUMMANDS = ROWS * LENGTH * LENGTH
MICROBATCH_TOKENS = 48


class Functions(NamedTuple):
    """What the losses need of a framework.

    Fields:
        einsum: as in NumPy.
        softmax: over the last axis.
        take: (rows of a table, integers) -> rows.
        floats: array -> the same in the dtype of the parameters.
    """

    einsum: Any
    softmax: Any
    take: Any
    floats: Any


def lengths(seed: int = 0) -> np.ndarray:
    """Lengths of the rows; one is as long as it can be."""
    found = np.random.default_rng(seed).integers(1, LENGTH + 1, ROWS)
    found[5] = LENGTH
    return found


def batch(dtype: str = "float64", seed: int = 0) -> dict[str, np.ndarray]:
    """Ids padded by 0, a target for each token, and a number for each row."""
    rng = np.random.default_rng(seed + 1)
    valid = np.arange(LENGTH) < lengths(seed)[:, None]
    return {
        "ids": (rng.integers(1, WORDS, (ROWS, LENGTH)) * valid).astype("int32"),
        "targets": (rng.normal(size=(ROWS, LENGTH)) * valid).astype(dtype),
        "row": np.arange(ROWS).astype(dtype),
    }


def parameters(dtype: str = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes = {"words": (WORDS, WIDTH), "head": (WIDTH,)}
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def token_loss(f: Functions, w: Any, batch: Any) -> Any:
    """Mean squared error of the tokens, which see each other and no padding."""
    valid = f.floats(batch["ids"] != 0)
    x = f.take(w["words"], batch["ids"])
    unseen = ((valid - 1) * 1e9)[:, None, :]
    seen = f.softmax(f.einsum("btd,bsd->bts", x, x) + unseen)
    found = f.einsum("btd,d->bt", f.einsum("bts,bsd->btd", seen, x), w["head"])
    error = (found - batch["targets"]) ** 2 * valid
    return f.einsum("bt->", error) / f.einsum("bt->", valid)


def row_loss(f: Functions, w: Any, batch: Any) -> Any:
    """Mean squared error of the rows, each the sum of its words."""
    error = _sums(f, w, batch, f.floats(batch["ids"] != 0)) - batch["row"]
    return f.einsum("b,b->", error, error) / len(batch["row"])


def padding_loss(f: Functions, w: Any, batch: Any) -> Any:
    """Not safe to pack: the sum goes over padding too."""
    error = _sums(f, w, batch, f.floats(batch["ids"] >= 0)) - batch["row"]
    return f.einsum("b,b->", error, error) / len(batch["row"])


def coupled_loss(f: Functions, w: Any, batch: Any) -> Any:
    """Not safe to cut at all: rows are compared with the mean of those beside them."""
    found = _sums(f, w, batch, f.floats(batch["ids"] != 0))
    error = found - f.einsum("b->", found) / len(batch["row"]) - batch["row"]
    return f.einsum("b,b->", error, error) / len(batch["row"])


def _sums(f: Functions, w: Any, batch: Any, weight: Any) -> Any:
    x = f.einsum("btd,bt->bd", f.take(w["words"], batch["ids"]), weight)
    return f.einsum("bd,d->b", x, w["head"])
