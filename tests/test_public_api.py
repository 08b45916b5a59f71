"""The public names, signatures and commands. Whoever changes one changes it here, on purpose."""

import inspect
import subprocess
import sys
import typing
from collections.abc import Callable
from typing import Any

import jax
import pytest
import tensorflow as tf
import torch

import virtualbatch
import virtualbatch.jax
import virtualbatch.keras
import virtualbatch.lightning
import virtualbatch.report
import virtualbatch.tensorflow
import virtualbatch.torch
import virtualbatch.transformers

SIGNATURES = {
    virtualbatch.Window: "(microbatches, *, sorted_rows=False)",
    virtualbatch.pack: "(batch, lengths, *, microbatch_tokens, round_to=None, padded=None)",
    virtualbatch.windows: "(stream, accumulation_steps)",
    virtualbatch.report.Report: "(*results)",
    virtualbatch.report.write_html: "(file, *results)",
    virtualbatch.certify_loop: "(loop, batches, *, microbatch_size, save, load)",
    virtualbatch.tensorflow.certify_loop: "(loop, batches, *, microbatch_size, **state)",
    virtualbatch.keras.certify_loop: "(loop, batches, *, microbatch_size, **state)",
    virtualbatch.torch.captured: "(loss_fn)",
    virtualbatch.torch.certify_loop: "(loop, batches, *, microbatch_size, **state)",
    virtualbatch.jax.certify_loop: "(loop, state, batches, *, microbatch_size)",
    virtualbatch.tensorflow.value_and_gradients: (
        "(loss_fn, batch, variables, *, microbatch_size=None, accumulation_steps=None, "
        "weight=None, has_aux=False, stats=False, check=True)"
    ),
    virtualbatch.tensorflow.rowwise: (
        "(fn, *, microbatch_size=None, accumulation_steps=None, check=True)"
    ),
    virtualbatch.tensorflow.plan: (
        "(loss_fn, batch, variables, *, weight=None, has_aux=False, memory_limit=None)"
    ),
    virtualbatch.torch.plan: (
        "(loss_fn, batch, *, module, weight=None, has_aux=False, backward_fn=None, "
        "memory_limit=None)"
    ),
    virtualbatch.keras.accumulate: (
        "(model, *, microbatch_size=None, accumulation_steps=None, microbatch_tokens=None, "
        "lengths=None, check=True, gather=None)"
    ),
    virtualbatch.lightning.accumulate: "(module, *, microbatch_size=None, weight=None)",
    virtualbatch.lightning.restore: "(module)",
    virtualbatch.transformers.accumulate: (
        "(trainer, *, microbatch_size=None, microbatch_tokens=None, weight=None, "
        "accumulator_dtype=None)"
    ),
    virtualbatch.transformers.certify: "(trainer)",
    virtualbatch.transformers.restore: "(trainer)",
    virtualbatch.keras.plan: "(model, batch, *, memory_limit=None)",
    virtualbatch.keras.restore: "(model)",
    virtualbatch.keras.NoiseScaleCallback: "(decay=0.99)",
    virtualbatch.keras.certify: (
        "(model, batch, *, microbatch_size=None, accumulation_steps=None)"
    ),
    virtualbatch.tensorflow.certify: (
        "(loss_fn, batch, variables, *, microbatch_size=None, accumulation_steps=None, "
        "weight=None, has_aux=False)"
    ),
    virtualbatch.torch.certify: (
        "(loss_fn, batch, *, module, microbatch_size=None, accumulation_steps=None, weight=None, "
        "has_aux=False)"
    ),
    virtualbatch.jax.certify: (
        "(fun, argnums=0, has_aux=False, *, batch_argnum=1, microbatch_size=None, "
        "accumulation_steps=None, weight=None, accumulator_dtype=None, key_argnum=None, "
        "grad_fn=None)"
    ),
    virtualbatch.torch.backward: (
        "(loss_fn, batch, *, module, microbatch_size=None, accumulation_steps=None, weight=None, "
        "has_aux=False, backward_fn=None, stats=False, check=True, group=None, reduce=None, "
        "accumulator_dtype=None)"
    ),
    virtualbatch.torch.loss: (
        "(loss_fn, batch, *, module, microbatch_size=None, accumulation_steps=None, weight=None, "
        "has_aux=False, stats=False, check=True, scaler=None, group=None, reduce=None, "
        "accumulator_dtype=None)"
    ),
    virtualbatch.torch.rowwise: (
        "(fn, *, module=None, microbatch_size=None, accumulation_steps=None, check=True)"
    ),
    virtualbatch.torch.windows: "(stream, accumulation_steps, *, group=None)",
    virtualbatch.jax.plan: (
        "(fun, argnums=0, has_aux=False, *, batch_argnum=1, weight=None, accumulator_dtype=None, "
        "key_argnum=None, grad_fn=None, aux_merge=None, memory_limit=None)"
    ),
    virtualbatch.jax.rowwise: (
        "(fn, *, microbatch_size=None, accumulation_steps=None, batch_argnum=1, key_argnum=None, "
        "axis_name=None, check=True)"
    ),
    virtualbatch.jax.value_and_grad: (
        "(fun, argnums=0, has_aux=False, *, batch_argnum=1, microbatch_size=None, "
        "accumulation_steps=None, weight=None, accumulator_dtype=None, key_argnum=None, "
        "axis_name=None, grad_fn=None, aux_merge=None, stats=False, check=True)"
    ),
}

NAMES = {
    virtualbatch: {
        "Advice",
        "Auto",
        "AuxLossFn",
        "Certificate",
        "Finding",
        "LossFn",
        "NoiseEstimate",
        "NoiseScale",
        "Plan",
        "PlanRow",
        "WeightFn",
        "Window",
        "WindowStats",
        "certify_loop",
        "pack",
        "whole_groups",
        "windows",
    },
    virtualbatch.report: {"Report", "write_html"},
    virtualbatch.tensorflow: {
        "Window",
        "certify",
        "certify_loop",
        "plan",
        "rowwise",
        "value_and_gradients",
        "windows",
    },
    virtualbatch.keras: {
        "NoiseScale",
        "NoiseScaleCallback",
        "accumulate",
        "certify",
        "certify_loop",
        "plan",
        "restore",
    },
    virtualbatch.lightning: {"accumulate", "restore"},
    virtualbatch.transformers: {"TrainerCertificate", "accumulate", "certify", "restore"},
    virtualbatch.jax: {
        "Window",
        "certify",
        "certify_loop",
        "plan",
        "rowwise",
        "value_and_grad",
        "windows",
    },
    virtualbatch.torch: {
        "Window",
        "backward",
        "captured",
        "certify",
        "certify_loop",
        "loss",
        "plan",
        "rowwise",
        "windows",
    },
}


def signature_text(function: object) -> str:
    """A signature without annotations, which may become more precise."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_signature(function: object) -> None:
    assert signature_text(function) == SIGNATURES[function]


# What the whole call returns, by `has_aux` and `stats`; mypy checks that the overloads agree.
TORCH = {
    (False, False): torch.Tensor,
    (True, False): tuple[torch.Tensor, Any],
    (False, True): tuple[torch.Tensor, virtualbatch.WindowStats],
    (True, True): tuple[torch.Tensor, Any, virtualbatch.WindowStats],
}
RESULTS = {
    virtualbatch.torch.backward: TORCH,
    virtualbatch.torch.loss: TORCH,
    virtualbatch.tensorflow.value_and_gradients: {
        (False, False): tuple[tf.Tensor, Any],
        (True, False): tuple[tuple[tf.Tensor, Any], Any],
        (False, True): tuple[tf.Tensor, Any, virtualbatch.WindowStats],
        (True, True): tuple[tuple[tf.Tensor, Any], Any, virtualbatch.WindowStats],
    },
    virtualbatch.jax.value_and_grad: {
        (False, False): Callable[..., tuple[jax.Array, Any]],
        (True, False): Callable[..., tuple[tuple[jax.Array, Any], Any]],
        (False, True): Callable[..., tuple[jax.Array, Any, virtualbatch.WindowStats]],
        (True, True): Callable[..., tuple[tuple[jax.Array, Any], Any, virtualbatch.WindowStats]],
    },
}
FLAGS = ("has_aux", "stats")


@pytest.mark.parametrize("function", RESULTS, ids=lambda function: function.__qualname__)
def test_types_of_results(function: object) -> None:
    parameters = inspect.signature(function).parameters
    found = {}
    for overload in typing.get_overloads(function):
        hints, own = typing.get_type_hints(overload), inspect.signature(overload).parameters
        literal = {name: hints[name] is not bool for name in FLAGS}
        if all(literal.values()):
            flags = tuple(hints[name].__args__[0] for name in FLAGS)
            found[flags] = hints["return"]
            # Who leaves it out gets the overload of False.
            for name, flag in zip(FLAGS, flags, strict=True):
                assert own[name].default is (inspect.Parameter.empty if flag else False)
        else:
            # A bool that no type checker knows.
            assert hints["return"] in (Any, Callable[..., Any])
        (options,) = typing.get_args(hints["options"])
        assert {*own} - {"options"} | {*options.__annotations__} == {*parameters}
        for name, hint in typing.get_type_hints(options).items():
            assert hint == typing.get_type_hints(function)[name], name
    assert found == RESULTS[function]


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_public_names(module: object) -> None:
    assert set(module.__all__) == NAMES[module]


@pytest.mark.parametrize(
    "name", ["tensorflow", "keras", "torch", "jax", "transformers", "lightning"]
)
def test_completion_shows_the_public_names_only(name: str) -> None:
    module = getattr(virtualbatch, name)
    assert dir(module) == sorted(module.__all__)


def test_older_names_stay() -> None:
    assert virtualbatch.keras.NoiseScale is virtualbatch.keras.NoiseScaleCallback
    size = virtualbatch.PlanRow(8, None, False, None)
    found = virtualbatch.Plan(8, 1, 1000, "All fit.", (size,))
    assert found.sizes == found.rows == (size,)
    assert "sizes" not in found.to_json()


def test_every_public_function_is_documented() -> None:
    for function in SIGNATURES:
        documentation = inspect.getdoc(function)
        assert "Args:" in documentation, function
        assert "Example:" in documentation or "Does nothing" in documentation, function


def test_commands() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "virtualbatch", "--help"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    commands = found.partition("Commands:")[2].split("\n")
    assert {line.split()[0] for line in commands if line.strip()} == {
        "bench",
        "certify",
        "check",
        "demo",
        "doctor",
        "plan",
    }
