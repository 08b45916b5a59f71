"""Refuses what cannot be trained by windows, and warns of what windows do not make exact."""

import logging
from dataclasses import is_dataclass
from typing import Any

import keras

from virtualbatch.window.tree import builder, common_rows
from virtualbatch.window.window import Window

_log = logging.getLogger("virtualbatch")


def check_kind(model: Any) -> None:
    """Refuses an object that is not a model.

    Raises:
        TypeError: not a Keras model.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"accumulate takes a Keras model. Got {type(model).__name__}. "
            f"For a loop of your own use {_own_loop()[0]}."
        )


def check_model(model: Any) -> None:
    """Refuses a model that cannot be trained by windows.

    Raises:
        TypeError: not a Keras model.
        ValueError: the model is not compiled, has a `train_step` of its own, its optimizer
            accumulates already, or a layer keeps state per row.
    """
    check_kind(model)
    if not model.compiled:
        raise ValueError(
            "A model must be compiled before it can accumulate. "
            f"Got the model {model.name!r}, not compiled. Call model.compile(...) first."
        )
    own = type(model).train_step is not keras.Model.train_step
    if own or ("train_step" in vars(model) and not accumulates(model)):
        ours, theirs = _own_loop()
        raise ValueError(
            "accumulate replaces the train_step of a model, so the model must use Keras' own. "
            f"Got {type(model).__name__} with a train_step of its own. "
            f"In that train_step, call {ours} instead of {theirs}."
        )
    refuse_accumulating_optimizer(model.optimizer)
    stateful = [
        layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)
    ]
    if stateful:
        raise ValueError(
            "A layer that keeps state per row cannot be cut by rows. "
            f"Got stateful=True in {', '.join(stateful)}. Use stateful=False."
        )


def _own_loop() -> tuple[str, str]:
    """(our call for a training loop on Keras' backend, the call that it replaces)."""
    match keras.backend.backend():
        case "torch":
            return "virtualbatch.torch.backward", "loss.backward()"
        case "jax":
            return "virtualbatch.jax.value_and_grad", "jax.value_and_grad"
        case _:
            return "virtualbatch.tensorflow.value_and_gradients", "tf.GradientTape"


def accumulates(model: keras.Model) -> bool:
    """Whether the model accumulates: `accumulate` was called and `restore` was not."""
    return getattr(vars(model).get("train_step"), "is_virtualbatch", False)


def refuse_accumulating_optimizer(optimizer: Any) -> None:
    """Refuses an optimizer that accumulates by itself, which would cut every window again.

    Raises:
        ValueError: `gradient_accumulation_steps` is set.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    steps = getattr(inner, "gradient_accumulation_steps", None)
    if steps:
        raise ValueError(
            "Only one of Keras and virtualbatch can accumulate gradients. "
            f"Got an optimizer with gradient_accumulation_steps={steps}. "
            "Compile with an optimizer without it and pass the whole batch to fit."
        )


def replica_count(model: keras.Model) -> int:
    """How many replicas of a `tf.distribute` strategy train a model; 1 without a strategy."""
    strategy = getattr(model, "distribute_strategy", None)
    return int(getattr(strategy, "num_replicas_in_sync", 1))


def refuse_on_replicas(model: keras.Model, rule: str, fix: str) -> None:
    """Refuses a model on several replicas, for functions that work on one device.

    Args:
        model: the model.
        rule: the sentence that states the rule.
        fix: the sentence that says what to do instead.

    Raises:
        ValueError: the model has several replicas.
    """
    if replica_count(model) > 1:
        raise ValueError(f"{rule} Got a model in {named_strategy(model)}. {fix}")


def named_strategy(model: keras.Model) -> str:
    """The strategy of a model and its number of replicas, in words."""
    return f"a {type(model.distribute_strategy).__name__} of {replica_count(model)} replicas"


def unpacked_batch(model: keras.Model, batch: Any) -> tuple[Any, Any, Any]:
    """(x, y, sample_weight) of a batch that a user gives.

    Args:
        model: a compiled model.
        batch: x, (x, y) or (x, y, sample_weight).

    Raises:
        ValueError: it is a list for a model whose loss needs targets, because a list counts as x
            alone; or it holds a Window; or numbers of rows differ or are missing.
        TypeError: it holds something other than arrays.
    """
    if isinstance(batch, list) and model.loss is not None:
        raise ValueError(
            "A batch must be x, (x, y) or (x, y, sample_weight), and a list counts as x alone. "
            f"Got a list of {len(batch)} and no targets, which the loss needs. Pass a tuple: (x, "
            "y), or tuple(batch) for what a PyTorch DataLoader gives."
        )
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(
        batch if isinstance(batch, tuple) else (batch,)
    )
    leaves: list[tuple[str, Any]] = []
    for name, part in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        builder(part, name, leaves, lists=False)
    arrays = [(path, leaf) for path, leaf in leaves if leaf is not None]
    for path, leaf in arrays:
        if isinstance(leaf, Window):
            raise ValueError(
                "A batch must not be cut in advance: virtualbatch cuts it. Got a Window. Pass the "
                "batch that the window was cut from."
            )
        if not hasattr(leaf, "shape"):
            raise TypeError(
                "A batch must be made of arrays. "
                f"Got {path} of type {type(leaf).__name__}. Pass arrays as fit yields them."
            )
    for part in keras.tree.flatten((x, y, sample_weight)):
        # We could cut a dataclass, but Keras does not look into it.
        if is_dataclass(part):
            raise TypeError(
                "Keras finds arrays in dicts, lists and tuples. "
                f"Got a {type(part).__name__} in the batch. Pass a dict instead."
            )
    common_rows(arrays)
    return x, y, sample_weight


def say_what_is_not_exact(model: keras.Model) -> None:
    """Warns of layers whose result depends on how the batch is cut.

    Args:
        model: a compiled model.
    """
    layers = list(model._flatten_layers())
    batchnorm = [
        layer
        for layer in layers
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    merged = [layer.name for layer in batchnorm if not layer.renorm]
    if merged:
        _log.warning(
            "BatchNormalization (%s) normalises each micro-batch by its own statistics, as data "
            "parallelism does; its moving averages are updated once per batch.",
            ", ".join(merged),
        )
    spectral = [x for x in layers if isinstance(x, keras.layers.SpectralNormalization)]
    stepwise = [layer.name for layer in batchnorm if layer.renorm] + [x.name for x in spectral]
    if stepwise:
        _log.warning(
            "BatchNormalization with renorm=True and SpectralNormalization (%s) change with each "
            "forward pass, so they change with each micro-batch.",
            ", ".join(stepwise),
        )
