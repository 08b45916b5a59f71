"""The Keras engine: `fit` on large batches, on the memory of small ones.

`accumulate` gives one model a `train_step` that runs each batch of `fit` as a window of
micro-batches; everything around it (data, callbacks, optimizer, saving) stays Keras.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import keras

from virtualbatch.certify.certificate import Certificate
from virtualbatch.keras._backend import Backend
from virtualbatch.keras._certify.certificate import certificate
from virtualbatch.keras._certify.loop import certify_loop
from virtualbatch.keras._checks import (
    accumulates,
    check_kind,
    check_model,
    refuse_on_replicas,
    say_what_is_not_exact,
    unpacked_batch,
)
from virtualbatch.keras._copies import HOOKS, DeepCopy, Reduction
from virtualbatch.keras._gather.detection import found_as_asked
from virtualbatch.keras._gather.gathering import Found
from virtualbatch.keras._noise import NoiseScale
from virtualbatch.keras._packing import asked_packing
from virtualbatch.plan.auto import Auto, check_sizes_or_auto, is_automatic
from virtualbatch.plan.plan import Plan
from virtualbatch.window.options import check_flags
from virtualbatch.window.tree import array_leaves, common_rows

__all__ = ["NoiseScale", "accumulate", "certify", "certify_loop", "plan", "restore"]


def __dir__() -> list[str]:
    """What is public: completion shows no other names."""
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
    microbatch_size: int | str | Auto | None = None,
    accumulation_steps: int | None = None,
    microbatch_tokens: int | None = None,
    lengths: Callable[[Any], Any] | None = None,
    check: bool = True,
    gather: bool | None = None,
) -> Model:
    """Makes every batch of `fit` and `train_on_batch` one update, computed in micro-batches.

    Call it once, after `compile`, also after an earlier `fit`. A later `compile` keeps it; another
    call changes the size; `restore` takes it back. `copy.deepcopy` keeps it. A saved, pickled or
    cloned model does not know of it: call it again on what is loaded.

    If memory runs out, the window runs again with half the rows: on PyTorch any window, elsewhere
    the first one of each shape of batch, before which all weights are copied. On JAX a later one
    overwrites them: if memory runs out there, weights and optimizer state may be gone, as the error
    says. Save checkpoints.

    Args:
        model: a compiled model.
        microbatch_size: rows of one forward and backward, on one device; or "auto" or an `Auto`,
            which plan it at the first batch of `fit` or `train_on_batch`.
        accumulation_steps: micro-batches per batch: `microbatch_size = ceil(rows / steps)`, where
            replicas of a `tf.distribute` strategy each cut the rows that they have. Given
            both, they must agree for every batch but the last, short one of an epoch.
        microbatch_tokens: instead of a size, for padded text and series: rows of a batch are
            sorted by length and packed, so that rows times longest row of a micro-batch are at
            most this, and trimmed to that row. See docs/guides/packing.md for when that is safe.
        lengths: with `microbatch_tokens`, a function from the x of a batch to the length of each
            row, integers >= 1. It is called wherever Keras runs the train step, compiled too.
        check: whether losses and layers that are not Keras' own prove themselves before the first
            update: whether micro-batches of a few rows add up to those rows in one. For that they
            are called more often, without dropout and without statistics of the batch. What does
            not add up is refused by `fit`; what cannot be tried is said in a log line.
        gather: which losses get the predictions of all rows, so that they and their metrics are
            exact, for one more forward. None: those that need them, which is found out at the
            first batch and said: losses that return one number or compare rows, and an overridden
            `compute_loss`. True: all. False: none; a number is then taken for a mean over rows.

    Returns:
        The model.

    Raises:
        TypeError: `model` is not a Keras model, `lengths` is not a function, or `gather` is not
            None, True or False.
        ValueError: the model is not compiled, has a `train_step` of its own, its optimizer
            accumulates already, a layer keeps state per row, a size is not a positive integer, only
            one of `microbatch_tokens` and `lengths` is given, or several replicas cannot do it.
        NotImplementedError: Keras runs on a backend that this version does not support, or on
            PyTorch in one of several processes.

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
    keras_backend = _backend_for(model)
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
    """Finds the micro-batch that fits and is fast, before anything is trained.

    Peak memory is that of a whole update, the optimizer included: on JAX as XLA tells it without
    running it; on PyTorch counted, and on TensorFlow measured, while updates run that are taken
    back. It grows linearly with the micro-batch size, so two or three measurements predict every
    size. Then a few sizes are timed, the whole batch each, for ten seconds at the most; the
    smallest within 2 % of the fastest is chosen. All values of the model, its optimizer and its
    metrics are as before.

    Args:
        model: a compiled model; it need not accumulate. It is built if it is not.
        batch: a batch as `fit` yields it: x, (x, y) or (x, y, sample_weight).
        memory_limit: what weights, optimizer state, the batch, gradients and activations may take
            together: bytes, or a text such as "2GiB" or "80%" of what they may take now; None for
            all that the device, or the container that this process is in, has left besides what
            is held already.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: not even one row fits, a limit does not parse, targets are missing, or the
            model is one that `accumulate` refuses.
        NotImplementedError: this version does not support the backend, or nothing tells a peak.

    Example:
        >>> model = keras.Sequential([keras.layers.Dense(1)])
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> found = plan(model, (keras.ops.ones((64, 3)), keras.ops.ones((64, 1))))
        >>> found.microbatch_size <= 64
        True
    """
    keras_backend = _backend_for(model)
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

    Keras' own train step runs on the uncut batch, and the one that `accumulate` would install runs
    in micro-batches; gradients, loss, metrics and what layers keep are compared before the
    optimizer sees them. So the batch must fit in memory uncut. What draws random numbers (dropout,
    noise) is turned off, and half precision is replaced by float32. All values of the model, its
    optimizer, its metrics and its random numbers are as before the call.

    Args:
        model: a compiled model; it need not accumulate. It is built if it is not.
        batch: a batch as `fit` yields it: x, (x, y) or (x, y, sample_weight).
        microbatch_size: rows of one forward and backward.
        accumulation_steps: micro-batches per batch.

    Returns:
        The certificate, with the error of each parameter and named findings.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: there is only one row or one micro-batch, targets are missing, or the model is
            one that `accumulate` refuses.
        NotImplementedError: this version does not support the backend.

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
    keras_backend = _backend_for(model)
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
    """
    check_kind(model)
    if accumulates(model):
        for name in vars(model).keys() & set(_ATTRIBUTES):
            delattr(model, name)
        model.train_function = None
    return model


def _found(model: keras.Model, batch: Any, keras_backend: Backend) -> Found:
    """What of a model's loss needs all rows of a batch, and gets them as it accumulates now."""
    rows = common_rows(array_leaves(batch)) or 0
    kept = keras_backend.kept(model)
    try:
        return found_as_asked(model, batch, rows, keras_backend.evaluate, _asked(model))
    finally:
        for state in kept:
            state.restore()


def _asked(model: keras.Model) -> bool | None:
    """What of its predictions a model was asked to gather, where it accumulates."""
    asked: bool | None = model.train_step.gather if accumulates(model) else None
    return asked


def _backend_for(model: Any) -> Backend:
    """Keras' backend, for a model that it can train by windows."""
    keras_backend = _backend()
    check_model(model)
    keras_backend.refuse(model)
    return keras_backend


def _backend() -> Backend:
    """That of Keras' backend; its framework is the only one that is imported.

    Raises:
        NotImplementedError: this version does not support the backend.
    """
    match keras.backend.backend():
        case "tensorflow":
            from virtualbatch.keras._tensorflow.step import BACKEND as tensorflow

            return tensorflow
        case "torch":
            from virtualbatch.keras._torch.step import BACKEND as torch

            return torch
        case "jax":
            from virtualbatch.keras._jax.step import BACKEND as jax

            return jax
        case other:
            raise NotImplementedError(
                "accumulate works on Keras' TensorFlow, JAX and PyTorch backends. "
                f"Got the backend {other!r}. Set KERAS_BACKEND to tensorflow, jax or torch."
            )
