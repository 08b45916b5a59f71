"""Refuses uses of Flax that cannot work, and says what works instead.

Flax is not imported: if the user has not imported it, there is nothing to refuse.
"""

import sys
from typing import Any


def framework_errors() -> tuple[type[Exception], ...]:
    """Classes of errors for which `explanation` may have a better text."""
    errors = sys.modules.get("flax.errors")
    of_flax = () if errors is None else (errors.TraceContextError,)
    return (TypeError, ValueError, *of_flax)


def explanation(error: Exception) -> Exception | None:
    """The error to raise instead of a framework's error; None if that error is clear enough."""
    text = str(error)
    if "different trace level" in text:
        return ValueError(
            "A loss must not change a module that was made outside of it, and must not draw from "
            f"that module's own random numbers. Got {type(error).__name__}: "
            f"{' '.join(text.split(' (http')[0].split())}. Merge a copy in the loss: "
            "nnx.merge(graph, params, rest, copy=True). Seed it for each micro-batch with "
            "nnx.reseed(module, default=key), where key_argnum names the argument key. Return "
            "other changes as aux. docs/guides/jax_flax.md shows all of it. "
            "See docs/guides/state.md."
        )
    if "grad requires real- or complex-valued inputs" in text:
        return TypeError(
            "The argument that is differentiated must hold floating numbers only. Got "
            f"{text.split(' If you want')[0]} Split the rest off: nnx.split(model, nnx.Param, "
            "...) as in docs/guides/jax_flax.md, or grad_fn=equinox.filter_value_and_grad."
        )
    return None


def refuse_scaled_gradients(result: Any) -> None:
    """Refuses a loss that differentiates itself.

    Raises:
        TypeError: the loss returned the result of `DynamicScale.value_and_grad`.
    """
    if isinstance(result, tuple) and hasattr(result, "dynamic_scale"):
        raise TypeError(
            "fun must return a loss, not its gradients. "
            f"Got a {type(result).__name__}. "
            f"Pass the loss itself, and let grad_fn scale it: {_UNPACKED}"
        )


def check_differentiated(result: Any) -> None:
    """Refuses a result of `grad_fn` that has another form than that of `jax.value_and_grad`.

    Raises:
        TypeError: the result is no pair, or its first item is no pair.
    """
    if _is_pair(result) and _is_pair(result[0]):
        return
    if _is_pair(result):
        raise TypeError(
            "The function that grad_fn makes must return ((value, aux), gradients), as "
            f"jax.value_and_grad does. Got a {type(result[0]).__name__} in the place of (value, "
            "aux), as jax.grad returns. Pass a function that returns the value too, such as "
            "jax.value_and_grad."
        )
    raise TypeError(
        "The function that grad_fn makes must return ((value, aux), gradients), as "
        "jax.value_and_grad does. Got a "
        f"{type(result).__name__}{f' of {len(result)}' if isinstance(result, tuple) else ''}. "
        f"Return these two alone; for DynamicScale of Flax {_UNPACKED}"
    )


def _is_pair(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) == 2


_UNPACKED = (
    "lambda f, has_aux: lambda *args: dynamic_scale.value_and_grad(f, has_aux=has_aux)(*args)[2:]. "
    "docs/guides/jax_flax.md says how the scale is updated."
)
