"""Keras on TensorFlow: a `train_step` that runs one batch as a window.

The batch is checked and cut, what is not built is built outside the graph, and the window runs. The
train function around it keeps XLA inside the loop over micro-batches.
"""

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import keras
import tensorflow as tf

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.certificate import build_symbolically
from virtualbatch.keras._certify.eager_program import EagerProgram
from virtualbatch.keras._certify.first_window import prove_first_window
from virtualbatch.keras._checks import replica_count
from virtualbatch.keras._gather.detection import evaluated_eagerly
from virtualbatch.keras._gather.gathering import Found, Gathering
from virtualbatch.keras._guard import Guard
from virtualbatch.keras._snapshot import Snapshot
from virtualbatch.keras._tensorflow.cut import Cut
from virtualbatch.keras._tensorflow.data import given_back, has_open_rows_only, taken
from virtualbatch.keras._tensorflow.gathered_replicas import GatheredReplicaRun
from virtualbatch.keras._tensorflow.gathered_window import GatheredRun
from virtualbatch.keras._tensorflow.packing import PackedCut
from virtualbatch.keras._tensorflow.plan import MEMORY, planned
from virtualbatch.keras._tensorflow.replica_checks import refuse_replicas
from virtualbatch.keras._tensorflow.replica_train_function import make_replica_train_function
from virtualbatch.keras._tensorflow.replicas import ReplicaRun, known_to_all
from virtualbatch.keras._tensorflow.train_function import in_our_words, plain_train_function
from virtualbatch.keras._tensorflow.window import WindowRun, rows_of
from virtualbatch.keras._train_step import TrainStep
from virtualbatch.plan.plan import Plan
from virtualbatch.tensorflow._batch import Segment, after, is_array, specs
from virtualbatch.tensorflow._certify.eager_random import EagerRandom
from virtualbatch.tensorflow._replicas import with_a_row
from virtualbatch.window.cut import sizes_disagree
from virtualbatch.window.tree import array_leaves, common_rows

_MANY = sys.maxsize


class TensorFlowStep(TrainStep):
    """The `train_step` of a model that accumulates on TensorFlow."""

    _layers_built = False

    def __call__(self, data: Any) -> dict[str, Any]:
        """Trains on one batch, as Keras' `train_step` does."""
        model = self._model
        batch = self._unpacked(data)
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return self._on_a_replica(batch)
        with tf.variable_creator_scope(_created_outside):
            packing = self._packing_in_force()
            cut: Cut | PackedCut
            if packing is None:
                batch = self._with_agreeing_sizes(
                    batch, rows_of(batch), self._model._loss_tracker.count
                )
                cut = Cut(batch, *self._cut_by())
            else:
                cut = PackedCut(model, batch, packing)
            microbatches = cut.segments()
            if not self._layers_built:
                _build_layers(model, microbatches[0].get(0)[0])
                self._layers_built = True
            _build_optimizer(model)
            rows, stats = rows_of(batch), self.listener is not None
            gathering = None if _is_one(microbatches) else self._gathering_of(batch, rows)
            if gathering is None:
                window = WindowRun(model, microbatches, rows, cut.stretch, self._added, stats)
            else:
                window = GatheredRun(model, batch, cut, rows, self._added, gathering)
            results = window.train()
            self._say(window.losses_of_one_number)
        return results

    def _on_a_replica(self, batch: Any) -> dict[str, Any]:
        """Trains on the rows of one of several replicas, perhaps none."""
        model = self._model
        refuse_replicas(model)
        gathering = self.gathering(batch)
        rows = rows_of(batch)
        batch = with_a_row(_of_equal_rows(batch), rows)
        everywhere, seen = known_to_all(rows, model._loss_tracker.count)
        packing = self._packing_in_force()
        cut: Cut | PackedCut
        if packing is None:
            batch = self._with_agreeing_sizes(batch, tf.reduce_max(everywhere), seen)
            cut = Cut(batch, *self._cut_by())
        else:
            cut = PackedCut(model, batch, packing, rows)
        window: WindowRun
        if gathering is None:
            window = ReplicaRun(
                model,
                cut.segments(),
                rows,
                tf.reduce_sum(everywhere),
                cut.stretch,
                self._added,
                self.listener is not None,
            )
        else:
            window = GatheredReplicaRun(model, batch, cut, everywhere, self._added, gathering)
        results = window.train()
        self._say(window.losses_of_one_number)
        return results

    def next_to_try(self) -> str:
        """What to ask for instead, where memory ran out."""
        size, steps = self._asked()
        if size is None:
            return f"accumulation_steps={2 * (steps or 1)} or more"
        return f"microbatch_size={max(size // 2, 1)} or less"

    def _gathering_of(self, batch: Any, rows: Any) -> Gathering | None:
        if tf.executing_eagerly():
            self.look_for_coupled(batch, int(rows), evaluated_eagerly)
        return self.gathering(batch)

    def _cut_by(self) -> tuple[int | None, int | None]:
        """One of the two sizes: the one in force, or that which was asked for."""
        size, steps = self._asked()
        if self.most is None and size is None and steps is not None:
            return None, steps
        # Rows may not be known here; no micro-batch has more than there are.
        return self._in_force(_MANY, size), None

    def _with_agreeing_sizes(self, batch: Any, rows: Any, seen: Any) -> Any:
        """The batch, readable only if both sizes agree for it.

        The last batch of an epoch may be short. Which one that is only the data knows, but the
        first of an epoch, where the loss tracker has counted nothing yet, is not.

        Args:
            batch: the batch.
            rows: its rows on one device; of several, on that which has most.
            seen: what the loss tracker has counted.
        """
        size, steps = self._asked()
        if size is None or steps is None:
            return batch
        count = (rows + size - 1) // size
        first = tf.equal(seen, 0)
        agree = tf.logical_or(
            tf.equal(count, steps), tf.logical_and(count < steps, tf.logical_not(first))
        )
        if tf.executing_eagerly():
            if not agree:
                raise ValueError(sizes_disagree(int(rows), size, steps))
            return batch
        before, after = sizes_disagree("ROWS", size, steps).split("ROWS")
        check = tf.debugging.Assert(agree, [before, rows, after])
        with tf.control_dependencies([check]):
            return tf.nest.map_structure(
                lambda leaf: tf.identity(leaf) if is_array(leaf) else leaf, batch
            )


def _of_equal_rows(batch: Any) -> Any:
    """The batch, readable only if its arrays have equally many rows, which may be none."""
    counts = tf.stack([tf.shape(x)[0] for x in tf.nest.flatten(batch) if x is not None])
    check = tf.debugging.Assert(
        tf.reduce_all(tf.equal(counts, counts[0])),
        ["All arrays of a batch must have the same number of rows. Got rows", counts],
    )
    return after([check], batch)


def _is_one(cut: Sequence[Segment]) -> bool:
    """Whether a batch is known to be one micro-batch."""
    return len(cut) == 1 and isinstance(cut[0].count, int) and cut[0].count == 1


def make_train_function(model: keras.Model) -> Callable[..., Any]:
    """A `make_train_function` that keeps XLA inside the loop over micro-batches.

    Keras would compile the whole `train_step`. A loop inside an XLA program is slow on some
    devices (on CPU a convolution in it takes a thousand times longer), so only the micro-batch's
    forward and backward are compiled, and the loop around them stays a plain graph. Cause of the
    slow convolution: https://github.com/jax-ml/jax/issues/12868

    A graph writes metrics and seeds while it runs. Until a window of some shape has fitted once,
    everything is copied before it, so that it can run again.
    """
    if replica_count(model) > 1:
        return make_replica_train_function(model, BACKEND)
    step = model.train_step
    guard = Guard(model, step, MEMORY)
    # Keras asks for the function once per fit, so that is when the data may still be empty.
    trained = False

    def make(force: bool = False) -> None:
        nonlocal trained
        trained = False
        if model.train_function is not None and not force:
            return
        guard.forget()
        run = plain_train_function(model)

        def train_function(iterator: Any) -> Any:
            nonlocal trained, run
            with in_our_words(trained):
                results = guarded(iterator)
            trained = True
            if guard.succeeded():
                run = plain_train_function(model)
            logs: dict[str, Any] = step.told(results)
            return logs

        def guarded(iterator: Any) -> Any:
            """The results of the next batches, on a path that costs nothing once they fitted."""
            shapes: Hashable
            from_dataset = isinstance(iterator, tf.data.Iterator)
            spec = iterator.element_spec if from_dataset else None
            if from_dataset and has_open_rows_only(spec):
                shapes = tuple(tf.nest.flatten(spec))
                if guard.fitted(shapes):
                    return run(iterator)
                batches = taken(iterator, model.steps_per_execution)
            else:
                if from_dataset:
                    batches = taken(iterator, model.steps_per_execution)
                else:
                    batches = list(islice(iterator, model.steps_per_execution))
                shapes = tuple(getattr(x, "shape", None) for x in tf.nest.flatten(batches))
            if not batches:
                return run(iterator)
            feed = partial(given_back, batches, spec) if from_dataset else partial(iter, batches)
            if guard.fitted(shapes):
                return run(feed())
            results = first_of_its_shape(batches, feed, from_dataset)
            if step.is_known() or not from_dataset:
                guard.remember(shapes)
            return results

        def first_of_its_shape(batches: list[Any], feed: Callable[[], Any], open_rows: bool) -> Any:
            largest = max(batches, key=lambda batch: (_rows(batch), _size(batch)))
            given = keras.utils.unpack_x_y_sample_weight(largest)
            # What the first window would make has to be there before it can be copied.
            _build_layers(model, given[0])
            _build_optimizer(model)
            snapshot = Snapshot(model)

            def make_again() -> None:
                nonlocal run
                run = plain_train_function(model)

            def look_for_coupled() -> bool:
                return step.look_for_coupled(given, _rows(largest), evaluated_eagerly)

            if open_rows and look_for_coupled():
                # The program serves larger batches, too, which would each be looked at.
                make_again()
            return guard.run(
                given,
                _rows(largest),
                lambda: run(feed()),
                snapshot.restore,
                make_again,
                lambda limit: planned(
                    partial(_step_of, model, step.found(given)), model, largest, limit
                ),
                lambda size: prove_first_window(
                    model, step, given, _rows(largest), size, BACKEND, MEMORY.errors
                ),
                look_for_coupled,
            )

        model.train_function = train_function

    return make


def plan(model: keras.Model, batch: Any, memory_limit: int | str | None, found: Found) -> Plan:
    """The plan for a batch, for a model that need not accumulate; see `virtualbatch.keras.plan`."""
    return planned(partial(_step_of, model, found), model, batch, memory_limit)


def _build(model: keras.Model, batch: Any) -> None:
    """Builds a model; one that asks for values in its `call` cannot be built without any."""
    if not model.run_eagerly:
        build_symbolically(model, batch)
        return
    _build_layers(model, tf.nest.map_structure(tf.convert_to_tensor, batch[0]))
    _build_optimizer(model)


def _sizes(rows: int, size: int) -> list[int]:
    """Rows of each micro-batch: of one size, and a remainder."""
    return [min(size, rows - start) for start in range(0, rows, size)]


def _step_of(model: keras.Model, found: Found, size: int) -> Callable[[Any], Any]:
    """The step of a model with micro-batches of so many rows."""
    return TensorFlowStep(model, size, None, gather=found)


def _rows(batch: Any) -> int:
    return common_rows(array_leaves(batch)) or 0


def _size(batch: Any) -> int:
    # A ragged array does not know all its lengths; its rows decide then.
    shapes = [tf.TensorShape(array.shape).as_list() for _, array in array_leaves(batch)]
    return sum(math.prod(length or 1 for length in shape) for shape in shapes)


def _build_layers(model: keras.Model, x: Any) -> None:
    """Creates the variables of layers that have seen no data, and changes none.

    The window reads the statistics of a BatchNorm before its first forward.

    Args:
        model: the model.
        x: inputs of a micro-batch.
    """

    def forward(x: Any) -> Any:
        return model(x, training=False) if model._call_has_training_arg else model(x)

    if all(layer.built for layer in model._flatten_layers()):
        return
    if tf.executing_eagerly():
        forward(x)
    else:
        with tf.init_scope():
            tf.function(forward, autograph=False).get_concrete_function(specs(x))


def _build_optimizer(model: keras.Model) -> None:
    """Creates the optimizer's variables: it scales a loss by the first scale until it has one."""
    optimizer = model.optimizer
    if not optimizer.built and model.trainable_variables:
        # The scope in which Keras builds an optimizer at its first update: it names the variables.
        with tf.init_scope(), keras.name_scope(optimizer.name, caller=optimizer):
            optimizer.build(model.trainable_variables)


def _created_outside(next_creator: Callable[..., Any], **arguments: Any) -> Any:
    """Creates a variable outside the graph that is being traced.

    Left in it, one variable makes TensorFlow trace the whole step once or twice more.
    """
    with tf.init_scope():
        return next_creator(**arguments | {"experimental_enable_variable_lifting": False})


BACKEND = Backend(
    refuse=refuse_replicas,
    step=TensorFlowStep,
    make_train_function=make_train_function,
    plan=plan,
    build=_build,
    program=EagerProgram,
    cut=_sizes,
    is_concrete=lambda value: hasattr(value, "numpy"),
    kept=lambda model: [EagerRandom()],
    evaluate=evaluated_eagerly,
)
