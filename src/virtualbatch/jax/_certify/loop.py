"""Certifying a hand-written JAX training loop: a function from state to state."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from virtualbatch.certify import loop as loops
from virtualbatch.certify.certificate import Certificate


def certify_loop(
    loop: Callable[[Any, list[Any], int], Any],
    state: Any,
    batches: Iterable[Any],
    *,
    microbatch_size: int,
) -> Certificate:
    """Proves that your training loop makes the updates of the whole batch, or names its mistake.

    The loop runs on micro-batches and, with `accumulation_steps=1`, on the same rows as whole
    batches. Both runs must end in the same state. See `virtualbatch.certify_loop`.

    Args:
        loop: a function of a state, a list of micro-batches and `accumulation_steps`. It returns
            the state after training on them. It may use `jit`, and donate its arguments.
        state: a pytree of arrays: parameters, optimizer state and whatever else to compare.
        batches: two whole batches or more, in any iterable, as pytrees of dicts, lists and tuples.
            The first two are used.
        microbatch_size: the rows of one micro-batch: fewer than a batch has.

    Returns:
        The certificate.

    Raises:
        ValueError: there is nothing to compare, the loop is not deterministic, or the state is not
            finite.

    Example:
        >>> mean = lambda w, x: jax.numpy.mean(x @ w)
        >>> def loop(w, microbatches, accumulation_steps):
        ...     total = 0.0
        ...     for i, x in enumerate(microbatches, start=1):
        ...         total = total + jax.grad(mean)(w, x)
        ...         if i % accumulation_steps == 0:
        ...             w, total = w - 0.1 * total, 0.0
        ...     return w
        >>> batches = [np.ones((8, 2)), np.ones((8, 2))]
        >>> found = certify_loop(loop, jax.numpy.ones(2), batches, microbatch_size=4)
        >>> print(found.findings[0].kind, found.findings[0].why[:29])
        sum_loss The update is 2 times what it
    """
    current = {"state": _on_host(state)}

    def run(microbatches: list[Any], accumulation_steps: int) -> None:
        given = jax.tree.map(jax.numpy.asarray, current["state"])
        current["state"] = _on_host(loop(given, microbatches, accumulation_steps))

    def save() -> Any:
        leaves, _ = jax.tree_util.tree_flatten_with_path(current["state"])
        return {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in leaves}

    structure = jax.tree.structure(current["state"])

    def load(saved: Any) -> None:
        current["state"] = jax.tree.unflatten(structure, list(saved.values()))

    return loops.certify_loop(run, batches, microbatch_size=microbatch_size, save=save, load=load)


def _on_host(state: Any) -> Any:
    return jax.tree.map(np.asarray, state)
