"""Ways to make the updates of a batch in TensorFlow, in loops without `fit`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

import virtualbatch.tensorflow as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import (
    FLOOR,
    OURS,
    PEER,
    VIRTUALBATCH,
    WHOLE,
    WHOLE_BATCH,
    Contender,
    looped,
)
from virtualbatch.bench.keras_models import adam, contrastive, cross_entropy, model_of


class Problem(NamedTuple):
    """A model with its optimizer, a batch and its cut."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    batch: tuple[tf.Tensor, tf.Tensor]
    pieces: list[tuple[tf.Tensor, tf.Tensor]]
    weight: Callable[[Any], Any] | None
    pairs: bool

    def loss(self, batch: Any) -> tf.Tensor:
        """The mean loss."""
        if self.pairs:
            return contrastive(self.model(list(batch), training=True))
        x, y = batch
        # Keras divides by the number of tokens that the embedding's mask leaves.
        return cross_entropy()(y, self.model(x, training=True))

    def gradients(self, batch: Any) -> tuple[tf.Tensor, list[Any]]:
        """(loss, gradients) of a batch or micro-batch, computed at once."""
        with tf.GradientTape() as tape:
            loss = self.loss(batch)
        return loss, tape.gradient(loss, self.model.trainable_variables)

    def apply(self, gradients: Any) -> None:
        """Makes an update."""
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables, strict=True))


def problem(case: Case) -> Problem:
    """The problem of a case. Every call gives the same weights."""
    model, optimizer = model_of(case), adam()
    optimizer.build(model.trainable_variables)
    batch = tuple(map(tf.constant, case.batch()))
    size = case.microbatch_size
    pieces = [tuple(leaf[i : i + size] for leaf in batch) for i in range(0, case.rows, size)]
    weight = valid_tokens if case.model == "tokens" else None
    return Problem(model, optimizer, batch, pieces, weight, case.model == "pairs")


def entries(case: Case) -> list[Contender]:
    """All contenders that can run a case, each with its own model."""
    ours = _by_rows if case.model == "pairs" else _ours
    return [
        _contender(VIRTUALBATCH, OURS, case, ours),
        _contender("forward, backward in a loop, one update", FLOOR, case, _floor_in_a_loop),
        _contender("forward, backward called, one update", FLOOR, case, _floor_called),
        _contender(WHOLE_BATCH, WHOLE, case, _whole),
        eager_loop(case),
        _contender("compiled step, added in Python", PEER, case, _compiled_step),
    ]


def eager_loop(case: Case) -> Contender:
    """The loop that most people write: gradients added in Python, then divided."""
    return _contender("eager loop", PEER, case, _eager)


def _contender(
    name: str, role: str, case: Case, make: Callable[[Problem], Callable[[], Any]]
) -> Contender:
    given = problem(case)

    def weights() -> list[np.ndarray]:
        return [np.array(w) for w in given.model.get_weights()]

    return Contender(name, role, looped(make(given), float), weights)


def valid_tokens(batch: Any) -> Any:
    """The number of tokens of a batch that are not padding."""
    return tf.math.count_nonzero(batch[0])


def _ours(given: Problem) -> Callable[[], Any]:
    size = len(given.pieces[0][0])

    @tf.function
    def update(batch: Any) -> tf.Tensor:
        loss, gradients = vb.value_and_gradients(
            given.loss,
            batch,
            given.model.trainable_variables,
            microbatch_size=size,
            weight=given.weight,
        )
        given.apply(gradients)
        return loss

    return lambda: update(given.batch)


def _by_rows(given: Problem) -> Callable[[], Any]:
    encode = vb.rowwise(
        lambda batch: given.model(list(batch), training=True),
        microbatch_size=len(given.pieces[0][0]),
    )

    @tf.function
    def update(batch: Any) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = contrastive(encode(batch))
        given.apply(tape.gradient(loss, given.model.trainable_variables))
        return loss

    return lambda: update(given.batch)


def _floor_in_a_loop(given: Problem) -> Callable[[], Any]:
    """Runs all micro-batches in one loop of a graph. Each overwrites the gradients before it."""
    count = len(given.pieces)
    stacks = [tf.stack(leaves) for leaves in zip(*given.pieces, strict=True)]

    def body(i: Any, *latest: Any) -> Any:
        loss, gradients = given.gradients(tuple(stack[i] for stack in stacks))
        # Gradients of an embedding are slices, which do not know their shape.
        dense = [
            tf.ensure_shape(tf.convert_to_tensor(gradient), variable.shape)
            for gradient, variable in zip(gradients, given.model.trainable_variables, strict=True)
        ]
        return i + 1, loss, *dense

    @tf.function
    def update() -> tf.Tensor:
        values = [tf.identity(v.value) for v in given.model.trainable_variables]
        first = (tf.constant(0), tf.constant(0.0), *values)
        _, loss, *gradients = tf.while_loop(
            lambda i, *_: i < count, body, first, parallel_iterations=1
        )
        given.apply(gradients)
        return loss

    return update


def _floor_called(given: Problem) -> Callable[[], Any]:
    """Runs all micro-batches as calls of one graph, and the update as another graph."""
    step, apply = tf.function(given.gradients), tf.function(given.apply)

    def update() -> tf.Tensor:
        for piece in given.pieces:
            loss, gradients = step(piece)
        apply([tf.convert_to_tensor(gradient) for gradient in gradients])
        return loss

    return update


def _whole(given: Problem) -> Callable[[], Any]:
    @tf.function
    def update(batch: Any) -> tf.Tensor:
        loss, gradients = given.gradients(batch)
        given.apply(gradients)
        return loss

    return lambda: update(given.batch)


def _eager(given: Problem) -> Callable[[], Any]:
    return lambda: _added(given, given.gradients, given.apply)


def _compiled_step(given: Problem) -> Callable[[], Any]:
    """The eager loop, with forward and backward as one graph and the update as another."""
    step, apply = tf.function(given.gradients), tf.function(given.apply)
    return lambda: _added(given, step, apply)


def _added(given: Problem, step: Callable[[Any], Any], apply: Callable[[Any], Any]) -> tf.Tensor:
    total: list[Any] | None = None
    for piece in given.pieces:
        loss, gradients = step(piece)
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        if total is None:
            total = gradients
        else:
            total = [a + b for a, b in zip(total, gradients, strict=True)]
    apply([gradient / len(given.pieces) for gradient in total or []])
    return loss
