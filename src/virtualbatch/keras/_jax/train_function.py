"""Keras on JAX: the train function of a model that accumulates.

A program overwrites the state that it is given. So until a window of some shape has fitted once,
the program gets a copy. Then the window can run again.
"""

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import jax
import keras

from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.first_window import prove_first_window
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._guard import Guard
from virtualbatch.keras._jax.devices import processes_of_rows, rows_of_one_device
from virtualbatch.keras._jax.evaluate import evaluated
from virtualbatch.keras._jax.held import holding, is_gone, put_back, refuse_lost, weights_are_gone
from virtualbatch.keras._jax.plan import MEMORY, copied, planned
from virtualbatch.keras._jax.stateless import State
from virtualbatch.keras._not_finite import LOSSES
from virtualbatch.plan.auto import is_automatic
from virtualbatch.window.tree import array_leaves, common_rows


def make_jax_train_function(model: keras.Model, backend: Backend) -> Callable[..., Any]:
    """A `make_train_function` that keeps the model's values after errors.

    While `fit` trains, it takes the values out of the model's variables. After an error in the
    first batch Keras would not put them back, so the train function does.

    A program overwrites the state that it is given. So until a window of some shape has fitted
    once, the program gets a copy, and the window can run again. A later window that runs out of
    memory runs again too, unless the program has already overwritten the state.

    Args:
        model: the model; its `train_step` is ours.
        backend: our implementation for Keras' backend.
    """
    step = model.train_step
    guard = Guard(model, step, MEMORY)

    def make(force: bool = False) -> None:
        if model.train_function is not None and not force:
            return
        guard.forget()
        run = compiled()

        def train_function(state: Any, iterator: Any) -> Any:
            nonlocal run
            # Do not catch what `next` raises: Keras ends the epoch by it.
            batches = [next(iterator), *islice(iterator, model.steps_per_execution - 1)]
            shapes = tuple(
                (x.shape, x.dtype) if hasattr(x, "shape") else None
                for x in jax.tree.leaves(batches)
            )
            has_fitted = guard.fitted(shapes)
            refuse_lost(State(*state), wait=not has_fitted)
            try:
                result = later(state, batches) if has_fitted else None
                if result is None:
                    result = first_of_its_shape(state, batches)
                    guard.remember(shapes)
            except BaseException:
                put_back(model, State(*state))
                raise
            logs, after = result
            if guard.succeeded():
                run = compiled_again(after)
            return step.told(logs), after

        def updated(state: Any, batches: list[Any]) -> Any:
            """Runs batches. Returns the last logs, with the losses of all, and the new state."""
            losses: list[Any] = []
            for batch in batches:
                logs, state = run(state, iter([batch]))
                losses += [logs.pop(LOSSES)] if LOSSES in logs else []
            return logs | {LOSSES: losses}, state

        def later(state: Any, batches: list[Any]) -> Any:
            """Runs batches whose shape has fitted. None if memory ran out and they can rerun."""
            try:
                return updated(state, batches)
            except MEMORY.errors.kinds as error:
                if not MEMORY.errors.is_possible(error):
                    raise
                if is_gone(State(*state)):
                    raise weights_are_gone(error, State(*state)) from error
                if processes_of_rows() > 1:
                    raise
            return None

        def first_of_its_shape(state: Any, batches: list[Any]) -> Any:
            largest = max(batches, key=lambda batch: (_rows(batch), _size(batch)))

            processes = processes_of_rows()
            if processes > 1 and is_automatic(step.microbatch_size):
                raise ValueError(
                    'microbatch_size="auto" is planned in one process, but all processes must cut '
                    f"alike. Got {processes} processes. Pass what plan finds in one process."
                )

            def attempt() -> Any:
                try:
                    # JAX raises errors late, so wait for the results.
                    return jax.block_until_ready(updated(copied(state), batches))
                except MEMORY.errors.kinds as error:
                    if processes == 1 or not MEMORY.errors.is_possible(error):
                        raise
                    raise RuntimeError(
                        "All processes must run the same program, so none can run a batch again "
                        f"by itself. Got an out-of-memory error in one of {processes} processes. "
                        "Pass a smaller microbatch_size."
                    ) from error

            def make_again() -> None:
                nonlocal run
                run = compiled_again(state)

            given = keras.utils.unpack_x_y_sample_weight(largest)
            rows = rows_of_one_device(_rows(largest))

            def prove(size: int) -> None:
                with holding(model, State(*state)):
                    prove_first_window(model, step, given, rows, size, backend, MEMORY.errors)

            def look_for_coupled() -> bool:
                with holding(model, State(*state)):
                    return step.look_for_coupled(given, rows, evaluated)

            return guard.run(
                given,
                rows,
                attempt,
                lambda: None,
                make_again,
                lambda limit: planned(sized(step.found(given)), state, largest, rows, limit),
                prove,
                look_for_coupled,
            )

        model.train_function = train_function

    def sized(found: Found) -> Callable[[int], Any]:
        """The steps that a plan compares: a number of rows -> the step with such micro-batches."""
        return lambda size: backend.step(model, size, None, gather=found)

    def jax_state_sync() -> None:
        # Keras calls this last in each epoch, and reads values then anyway.
        type(model).jax_state_sync(model)
        step.losses.hear_all()

    def compiled() -> Any:
        """Keras' own train function, traced anew. The model keeps our train function."""
        ours = model.train_function
        # JAX caches traces by function, so pass a new function object for a new size.
        model.train_step = partial(step.with_losses)
        try:
            type(model).make_train_function(model, force=True)
        finally:
            model.train_step = step
        plain, model.train_function = model.train_function, ours
        return plain

    def compiled_again(state: Any) -> Any:
        # With a distribution, Keras reads from the variables where values are placed.
        with holding(model, State(*state)):
            return compiled()

    model.jax_state_sync = jax_state_sync
    return make


def _rows(batch: Any) -> int:
    return common_rows(array_leaves(batch)) or 0


def _size(batch: Any) -> int:
    return sum(array.size for _, array in array_leaves(batch))
