"""Models that cannot be trained by windows, and why."""

from typing import Any

import keras


def check_model(model: Any) -> None:
    """Refuses what cannot be trained by windows.

    Raises:
        TypeError: not a Keras model.
        ValueError: the model is not compiled, has a `train_step` of its own or several replicas,
            its optimizer accumulates already, or a layer keeps state per row.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"accumulate takes a Keras model. Got {type(model).__name__}. "
            "For a loop of your own use virtualbatch.tensorflow.value_and_gradients."
        )
    if not model.compiled:
        raise ValueError(
            "A model must be compiled before it can accumulate. "
            f"Got the model {model.name!r}, not compiled. Call model.compile(...) first."
        )
    own = type(model).train_step is not keras.Model.train_step
    if own or ("train_step" in vars(model) and not accumulates(model)):
        raise ValueError(
            "accumulate replaces the train_step of a model, so the model must use Keras' own. "
            f"Got {type(model).__name__} with a train_step of its own. In that train_step, call "
            "virtualbatch.tensorflow.value_and_gradients instead of the gradient tape."
        )
    refuse_accumulating_optimizer(model.optimizer)
    refuse_replicas(model)
    stateful = [
        layer.name for layer in model._flatten_layers() if getattr(layer, "stateful", False)
    ]
    if stateful:
        raise ValueError(
            "A layer that keeps state per row cannot be cut by rows. "
            f"Got stateful=True in {', '.join(stateful)}. Use stateful=False."
        )


def accumulates(model: keras.Model) -> bool:
    """Whether `accumulate` was called and not taken back."""
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


def refuse_replicas(model: keras.Model) -> None:
    """Refuses a model that is trained on several replicas.

    Raises:
        ValueError: a `tf.distribute` strategy of several replicas is in use.
    """
    strategy = getattr(model, "distribute_strategy", None)
    replicas = getattr(strategy, "num_replicas_in_sync", 1)
    if replicas > 1:
        raise ValueError(
            "accumulate works on one device; weights are not summed over replicas yet. "
            f"Got a model of {type(strategy).__name__} with {replicas} replicas. "
            "Build, compile and fit the model outside the strategy's scope."
        )
