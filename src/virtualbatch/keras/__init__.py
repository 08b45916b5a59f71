"""The Keras engine: `fit` on large batches, on the memory of small ones.

`accumulate` gives one model a `train_step` that runs each batch of `fit` as a window of
micro-batches; everything around it (data, callbacks, optimizer, saving) stays Keras.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

import keras

from virtualbatch.certify.certificate import Certificate
from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.certificate import certificate
from virtualbatch.keras._certify.loop import certify_loop
from virtualbatch.keras._checks import (
    accumulates,
    check_kind,
    refuse_on_replicas,
    say_what_is_not_exact,
    unpacked_batch,
)
from virtualbatch.keras._copies import HOOKS, DeepCopy, Reduction
from virtualbatch.keras._current_backend import backend_for
from virtualbatch.keras._gather.detection import found_as_asked
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._noise import NoiseScale, NoiseScaleCallback
from virtualbatch.keras._packing import asked_packing
from virtualbatch.plan.auto import Auto, check_sizes_or_auto, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.window.options import check_flags
from virtualbatch.window.tree import array_leaves, common_rows

__all__ = [
    "NoiseScale",
    "NoiseScaleCallback",
    "accumulate",
    "certify",
    "certify_loop",
    "plan",
    "restore",
]


def __dir__() -> list[str]:
    """The public names, so that completion shows no others."""
    return __all__


_PLAN_OUTSIDE = (
    "Build and compile the same model outside of the scope, call plan with it and the rows of one "
    "device, and pass the size that it finds."
)

# The attributes of a model that `accumulate` sets, and `restore` removes: the third on replicas of
# TensorFlow, the fourth on JAX.
_ATTRIBUTES = (
    "train_step",
    "make_train_function",
    "_maybe_symbolic_build",
    "jax_state_sync",
    *HOOKS,
)

Model = TypeVar("Model", bound=keras.Model)


def accumulate(
    model: Model,
    *,
    microbatch_size: int | Literal["auto"] | Auto | None = None,
    accumulation_steps: int | None = None,
    microbatch_tokens: int | None = None,
    lengths: Callable[[Any], Any] | None = None,
    check: bool = True,
    gather: bool | None = None,
) -> Model:
    """Makes every batch of `fit` and `train_on_batch` one update, computed in micro-batches.

    Call it once after `compile`; the model may have been fitted before. A later `compile` keeps
    it. Another call changes the size, and `restore` takes it back. `copy.deepcopy` copies it. A
    model that was saved, pickled or cloned does not have it, so call `accumulate` again after
    loading.

    If memory runs out, the update runs again with micro-batches of half the rows. On PyTorch that
    works for every update. On TensorFlow and JAX it works for the first update of each shape of
    batch, before which all weights are copied. On JAX a later update overwrites the weights in
    place. If memory runs out there, weights and optimizer state may be lost, and the error says
    so. Save checkpoints.

    Args:
        model: a compiled model.
        microbatch_size: the rows of one forward and backward on one device. `"auto"` or an `Auto`
            plans the size at the first batch of `fit` or `train_on_batch`.
        accumulation_steps: the micro-batches per batch, instead of a size:
            `microbatch_size = ceil(rows / accumulation_steps)`. Each replica of a `tf.distribute`
            strategy cuts its own rows. If you pass both, they must agree for the first batch of
            an epoch. Later batches may be shorter, never longer.
        microbatch_tokens: the tokens of a micro-batch, instead of a size, for padded text and
            series. The rows of a batch are sorted by length, packed and trimmed: rows times the
            longest row of a micro-batch is at most this. See docs/guides/packing.md for when that
            is safe.
        lengths: with `microbatch_tokens`, a function of the x of a batch that returns the length
            of each row: integers, 1 or more. It is also called in compiled programs.
        check: whether losses and layers that are not from Keras are checked before the first
            update: micro-batches of a few rows must add up to those rows in one micro-batch. They
            are called more often for that, without dropout and without batch statistics. `fit`
            raises if they do not add up. The log says what could not be checked.
        gather: which losses get the predictions of all rows, for the price of one more forward.
            They and their metrics are then exact. None: the losses that need it, which are found
            at the first batch and logged. These are losses that return one number or compare
            rows, and an overridden `compute_loss`. True: all losses. False: no loss, and a loss
            that returns one number is treated as a mean over rows.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a Keras model, `lengths` is not a function, or `gather` is not
            None, True or False.
        ValueError: the model is not compiled, has its own `train_step`, or a layer of it keeps
            state per row.
        ValueError: the optimizer accumulates gradients already.
        ValueError: a size is not a positive integer, or only one of `microbatch_tokens` and
            `lengths` is given.
        ValueError: the model trains on several replicas in a way that is not supported.
        NotImplementedError: Keras runs on a backend that is not supported, or on PyTorch in one of
            several processes.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> model = accumulate(model, microbatch_size=32)
        >>> x = keras.ops.ones((100, 3))
        >>> history = model.fit(x, x[:, :1], batch_size=50, verbose=0)
        >>> int(model.optimizer.iterations)
        2
    """
    check_flags(check=check)
    packing = asked_packing(microbatch_tokens, lengths)
    if packing is None:
        check_sizes_or_auto(microbatch_size, accumulation_steps)
    elif microbatch_size is not None or accumulation_steps is not None:
        raise ValueError(
            "Rows are packed by tokens or cut by number. "
            f"Got microbatch_tokens={microbatch_tokens} with microbatch_size={microbatch_size} "
            f"and accumulation_steps={accumulation_steps}. Pass microbatch_tokens and lengths only."
        )
    if gather is not None and not isinstance(gather, bool):
        raise TypeError(
            f"gather must be None, True or False. Got gather={gather!r}. "
            "Leave it out: then the losses that need all rows get them."
        )
    keras_backend = backend_for(model)
    if is_automatic(microbatch_size):
        refuse_on_replicas(model, 'microbatch_size="auto" plans one device.', _PLAN_OUTSIDE)
    step = keras_backend.step(
        model, microbatch_size, accumulation_steps, packing, check=check, gather=gather
    )
    restore(model)
    say_what_is_not_exact(model)
    model.train_step = step
    model.make_train_function = keras_backend.make_train_function(model)
    again = partial(
        accumulate,
        microbatch_size=microbatch_size,
        accumulation_steps=accumulation_steps,
        microbatch_tokens=microbatch_tokens,
        lengths=lengths,
        check=check,
        gather=gather,
    )
    model.__deepcopy__, model.__reduce__ = DeepCopy(model, again), Reduction(model)
    model.train_function = None
    return model


def plan(model: keras.Model, batch: Any, *, memory_limit: int | str | None = None) -> Plan:
    """Finds the micro-batch size that fits in memory and is fast, before you train.

    The peak memory is that of a whole update with its optimizer. On JAX, XLA reports it without
    running the update. On PyTorch it is counted, and on TensorFlow it is measured, while updates
    run that are undone. It grows linearly with the micro-batch size, so two or three measurements
    predict every size. Then a few sizes are timed, a whole batch each, for at most ten seconds.
    The smallest size within 2 % of the fastest is chosen.

    All values of the model, its optimizer and its metrics are as before the call.

    Args:
        model: a compiled model. It is built if it is not. `accumulate` need not be called before.
        batch: a whole batch as `fit` yields it: x, (x, y) or (x, y, sample_weight).
        memory_limit: the bytes that weights, optimizer state, the batch, gradients and activations
            may take together. Pass a number of bytes, a text such as `"2GiB"`, or a share such as
            `"80%"` of what they may take now. None means all that the device, or the container of
            this process, has free.

    Returns:
        The plan.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: not even one row fits, the limit does not parse, targets are missing, or
            `accumulate` would refuse the model.
        NotImplementedError: the backend is not supported, or nothing reports peak memory.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> found = plan(model, (keras.ops.ones((64, 3)), keras.ops.ones((64, 1))))
        >>> found.microbatch_size <= 64
        True
    """
    keras_backend = backend_for(model)
    refuse_on_replicas(model, "plan measures one device.", _PLAN_OUTSIDE)
    given = unpacked_batch(model, batch)
    model._symbolic_build(data_batch=given)
    return keras_backend.plan(model, given, memory_limit, _found(model, given, keras_backend))


def certify(
    model: keras.Model,
    batch: Any,
    *,
    microbatch_size: int | None = None,
    accumulation_steps: int | None = None,
) -> Certificate:
    """Proves that `accumulate` gives the update of the whole batch, or names what breaks it.

    The train step of Keras runs on the uncut batch, and the train step of `accumulate` runs in
    micro-batches. Gradients, loss, metrics and the state of layers are compared before the
    optimizer sees them. So the batch must fit in memory uncut. Layers that draw random numbers,
    such as dropout, are turned off.

    Both runs are in the dtypes of the model, because variables of Keras keep their dtype. So a
    float32 model is compared in float32, with the tolerance of float32. Half precision is replaced
    by float32. The notes of the certificate name the dtype. The rounding that the model itself
    adds is measured, by running the uncut batch again with its rows in other orders.

    All values of the model, its optimizer, its metrics and its random numbers are as before the
    call.

    Args:
        model: a compiled model. It is built if it is not. `accumulate` need not be called before.
        batch: a whole batch as `fit` yields it: x, (x, y) or (x, y, sample_weight).
        microbatch_size: the rows of one forward and backward. `"auto"` is refused.
        accumulation_steps: the micro-batches per batch, instead of a size.

    Returns:
        The certificate, with the error of each parameter and named findings.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: there is only one row or one micro-batch, targets are missing, or `accumulate`
            would refuse the model.
        NotImplementedError: the backend is not supported.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(2), keras.layers.BatchNormalization()])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> batch = keras.random.normal((8, 3), seed=1), keras.ops.ones((8, 2))
        >>> certify(model, batch, microbatch_size=4).findings[0].kind
        'batchnorm'
    """
    check_sizes_or_auto(microbatch_size, accumulation_steps)
    if is_automatic(microbatch_size):
        raise ValueError(
            'certify compares one cut. Got microbatch_size="auto". '
            "Pass the rows of a micro-batch, such as those that plan found."
        )
    keras_backend = backend_for(model)
    refuse_on_replicas(
        model,
        "certify compares on one device.",
        "Build and compile the same model outside of the scope, and certify that one.",
    )
    given = unpacked_batch(model, batch)
    return certificate(
        model, given, microbatch_size, accumulation_steps, keras_backend, _asked(model)
    )


def restore(model: Model) -> Model:
    """Takes back what `accumulate` did, so that the model is plain Keras again.

    Does nothing to a model that does not accumulate. Weights, optimizer and compilation stay.

    Args:
        model: a Keras model.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a Keras model.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> model = restore(accumulate(model, microbatch_size=32))
    """
    check_kind(model)
    if accumulates(model):
        for name in vars(model).keys() & set(_ATTRIBUTES):
            delattr(model, name)
        model.train_function = None
    return model


def _found(model: keras.Model, batch: Any, keras_backend: Backend) -> Found:
    """The parts of the loss that need all rows of the batch, under the model's present setting."""
    rows = common_rows(array_leaves(batch)) or 0
    kept = keras_backend.kept(model)
    try:
        return found_as_asked(model, batch, rows, keras_backend.evaluate, _asked(model))
    finally:
        for state in kept:
            state.restore()


def _asked(model: keras.Model) -> bool | None:
    """The `gather` setting of a model that accumulates; None for any other model."""
    asked: bool | None = model.train_step.gather if accumulates(model) else None
    return asked
