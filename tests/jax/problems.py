"""A batch with masks and sample weights, losses that are means over them, and comparisons."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tests.oracle import EXACT, assert_all_close

MODES = ["eager", "jit"]


def in_mode(mode: str, function: Any) -> Any:
    """The function un-jitted or jitted; it gets arrays of JAX."""
    if mode == "jit":
        return jax.jit(function)
    return lambda *args, **kwargs: function(*on_device(args), **kwargs)


def on_device(tree: Any) -> Any:
    """Arrays of NumPy as arrays of JAX."""
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, tree)


# Data are arrays of NumPy: modules are imported before a test asks JAX for float64.


def params(dtype: Any = np.float64) -> dict[str, Any]:
    random = np.random.default_rng(7)
    return {"w": random.normal(size=3).astype(dtype), "b": np.asarray(0.3, dtype)}


def batch(rows: int = 10) -> dict[str, Any]:
    """Rows of 4 tokens. Every third row has no token, only the last three have sample weights."""
    random = np.random.default_rng(rows)
    mask = (random.uniform(size=(rows, 4)) < 0.6) & (np.arange(rows) % 3 > 0)[:, None]
    sample_weight = np.where(np.arange(rows) >= rows - 3, np.arange(rows) + 0.25, 0.0)
    x, y = random.normal(size=(rows, 3)), random.normal(size=rows)
    return {"x": x, "y": y, "mask": mask, "sample_weight": sample_weight}


def outputs(params: Any, batch: Any) -> Any:
    return jnp.tanh(batch["x"] @ params["w"]) + params["b"]


def loss(params: Any, batch: Any) -> Any:
    """A mean over rows."""
    return jnp.mean((outputs(params, batch) - batch["y"]) ** 2)


def token_loss(params: Any, batch: Any) -> Any:
    """A mean over tokens: 0/0 without any."""
    errors = (outputs(params, batch) - batch["y"]) ** 2
    return (errors[:, None] * batch["mask"]).sum() / jnp.sum(batch["mask"])


def terms(params: Any, batch: Any) -> Any:
    """Three terms with three kinds of weight; those of `term_weights`."""
    errors = (outputs(params, batch) - batch["y"]) ** 2
    weighted = (errors * batch["sample_weight"]).sum() / jnp.sum(batch["sample_weight"])
    penalty = 0.1 * (params["w"] ** 2).sum()
    return {"tokens": token_loss(params, batch), "weighted": weighted, "penalty": penalty}


def tokens(batch: Any) -> Any:
    return batch["mask"].sum()


def term_weights(batch: Any) -> Any:
    return {"weighted": batch["sample_weight"].sum(), "tokens": tokens(batch), "penalty": None}


def uncut(fun: Any, *args: Any) -> Any:
    """Loss and gradients of the whole batch; a dict of terms is summed."""

    def total(*args: Any) -> Any:
        found = fun(*args)
        return sum(found.values()) if isinstance(found, dict) else found

    return jax.value_and_grad(total)(*args)


def pieces(batch: Any, *cuts: int) -> list[Any]:
    """The rows between the cuts, as micro-batches."""
    ends = pairwise(cuts)
    return [jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], batch) for a, b in ends]


def assert_same(actual: Any, expected: Any, rtol: float = EXACT) -> None:
    """Raises unless structures and dtypes are the same and values agree."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    found, due = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert [jnp.result_type(x) for x in found] == [jnp.result_type(x) for x in due]
    assert_all_close(parts(found), parts(due), rtol)


def parts(leaves: list[Any]) -> list[Any]:
    """Real arrays: a complex one as its real and its imaginary part."""
    return [
        part
        for x in map(np.asarray, leaves)
        for part in ((x.real, x.imag) if np.iscomplexobj(x) else (x,))
    ]
