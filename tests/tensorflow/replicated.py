"""Two replicas on two logical CPUs of this process, and what they give together."""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tests.tensorflow.modes import arrays
from tests.tensorflow.problems import problem

import virtualbatch.tensorflow as vb
from virtualbatch.tensorflow._arrays import as_tensor

DEVICES = ["CPU:0", "CPU:1"]
# Rows of each replica.
CUTS = {"12 and 12": (12, 12), "5 and 19": (5, 19), "0 and 24": (0, 24)}


@functools.cache
def two() -> tf.distribute.Strategy:
    """A strategy of two replicas."""
    return tf.distribute.MirroredStrategy(DEVICES)


def variable(value: Any, dtype: str = "float64") -> tf.Variable:
    """A variable of both replicas."""
    with two().scope():
        return tf.Variable(value, dtype=dtype)


def given(batches: Sequence[Any], strategy: tf.distribute.Strategy | None = None) -> Any:
    """A batch for each replica, as what `strategy.run` hands out."""
    strategy = strategy or two()

    def one(*leaves: Any) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: as_tensor(leaves[context.replica_id_in_sync_group])
        )

    return tf.nest.map_structure(one, *batches)


def parts(batch: Any, counts: Sequence[int]) -> list[Any]:
    """The rows of a batch, so many for each replica."""
    stops = np.cumsum(counts)
    return [
        tf.nest.map_structure(lambda x: x[stop - n : stop], batch)  # noqa: B023
        for n, stop in zip(counts, stops, strict=True)
    ]


def open_rows(batch: Any, strategy: tf.distribute.Strategy | None = None) -> Any:
    """Specs of a batch for each replica that leave its rows open."""
    found = tf.data.Dataset.from_tensors(batch).unbatch().batch(2)
    return (strategy or two()).experimental_distribute_dataset(found).element_spec


def run(
    replica: Callable[..., Any], spec: Any = None, strategy: tf.distribute.Strategy | None = None
) -> Any:
    """A graph that runs a function of one batch on each replica."""
    chosen = strategy or two()
    return tf.function(
        lambda batch: chosen.run(replica, args=(batch,)),
        input_signature=None if spec is None else [spec],
        autograph=False,
    )


def local(value: Any) -> list[Any]:
    """What each replica gave, as NumPy arrays."""
    return [np.asarray(x) for x in two().experimental_local_results(value)]


def together(gradients: Any) -> list[Any]:
    """The gradients of all replicas, added up as `apply_gradients` does."""
    flat = [two().experimental_local_results(leaf) for leaf in tf.nest.flatten(gradients)]
    return [None if found[0] is None else sum(arrays(found)) for found in flat]


def collectives(graph: Any) -> dict[str, int]:
    """Reductions in a graph, by where they are: at its top, or in the function of that name."""
    found: collections.Counter[str] = collections.Counter()
    definition = graph.as_graph_def()
    functions = [("top", definition.node)]
    functions += [(f.signature.name, f.node_def) for f in definition.library.function]
    for place, nodes in functions:
        found[place] += sum("Collective" in node.op for node in nodes)
    return {place: count for place, count in found.items() if count}


def three_terms() -> tuple[Any, Any, Any, list[tf.Variable]]:
    """Masked tokens, weighted rows and a penalty, over 24 rows.

    Returns:
        Loss, weight, batch and fresh variables.
    """
    found = problem("terms")

    def terms(batch: Any) -> Any:
        squares = [tf.reduce_sum(v**2) for v in found.variables]
        return found.loss_fn(batch) | {"penalty": 0.1 * tf.add_n(squares)}

    def weight(batch: Any) -> Any:
        return found.weight(batch) | {"penalty": None}

    return terms, weight, found.batch(24), found.variables


def window_of(loss_fn: Any, variables: Any, **options: Any) -> Callable[[Any], Any]:
    """A replica that runs one window."""
    return lambda batch: vb.value_and_gradients(loss_fn, batch, variables, **options)
