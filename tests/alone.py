"""One call of every public verb of an engine, where no other framework is installed.

    python -m tests.alone torch

What the verbs do is tested elsewhere; here they must do it without anything of another framework.
"""

import importlib.util
import sys
from collections.abc import Callable

from tests import programs

FRAMEWORKS = {"tensorflow", "torch", "jax"}
ROWS, SIZE = 8, 2


def torch() -> dict[str, Callable[[], object]]:
    import torch

    import virtualbatch.torch as vb

    call = programs.torch_program(ROWS)
    loss_fn, module = call["loss_fn"], call["module"]
    optimizer = torch.optim.SGD(module.parameters(), 0.1)

    def loop(microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            optimizer.zero_grad()
            window = vb.Window(microbatches[start : start + accumulation_steps])
            vb.backward(loss_fn, window, module=module)
            optimizer.step()

    return {
        "backward": lambda: vb.backward(**call, microbatch_size=SIZE),
        "loss": lambda: vb.loss(**call, microbatch_size=SIZE).backward(),
        "captured": lambda: vb.backward(
            vb.captured(loss_fn), call["batch"], module=module, microbatch_size=SIZE
        ),
        "rowwise": lambda: (
            vb.rowwise(module, microbatch_size=SIZE)(call["batch"][0]).std().backward()
        ),
        "plan": lambda: vb.plan(**call),
        "certify": lambda: vb.certify(**call, microbatch_size=SIZE).raise_if_inexact(),
        "certify_loop": lambda: vb.certify_loop(
            loop, [call["batch"]] * 2, microbatch_size=SIZE, module=module, optimizer=optimizer
        ).raise_if_inexact(),
    }


def jax() -> dict[str, Callable[[], object]]:
    import jax

    import virtualbatch.jax as vb

    call = programs.jax_program(ROWS)
    fun, (params, batch) = call["fun"], call["args"]

    def loop(state, microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            window = vb.Window(microbatches[start : start + accumulation_steps])
            gradients = vb.value_and_grad(fun)(state["params"], window)[1]
            state = {"params": jax.tree.map(lambda p, g: p - g, state["params"], gradients)}
        return state

    return {
        "value_and_grad": lambda: jax.jit(vb.value_and_grad(fun, microbatch_size=SIZE))(
            params, batch
        ),
        "rowwise": lambda: jax.jit(vb.rowwise(lambda params, batch: batch, microbatch_size=SIZE))(
            params, batch
        ),
        "plan": lambda: vb.plan(fun)(params, batch),
        "certify": lambda: vb.certify(fun, microbatch_size=SIZE)(params, batch).raise_if_inexact(),
        "certify_loop": lambda: vb.certify_loop(
            loop, {"params": params}, [batch] * 2, microbatch_size=SIZE
        ).raise_if_inexact(),
    }


def tensorflow() -> dict[str, Callable[[], object]]:
    import tensorflow as tf

    import virtualbatch.tensorflow as vb

    call = programs.tensorflow_program(ROWS)
    loss_fn, variables = call["loss_fn"], call["variables"]

    def loop(microbatches, accumulation_steps):
        for start in range(0, len(microbatches), accumulation_steps):
            window = vb.Window(microbatches[start : start + accumulation_steps])
            gradients = vb.value_and_gradients(loss_fn, window, variables)[1]
            for variable, gradient in zip(variables, gradients, strict=True):
                variable.assign_sub(gradient)

    def rowwise():
        first, _ = variables
        encode = vb.rowwise(lambda batch: batch[0] @ first, microbatch_size=SIZE)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.math.reduce_std(encode(call["batch"]), 0))
        return tape.gradient(loss, first)

    return {
        "value_and_gradients": lambda: vb.value_and_gradients(**call, microbatch_size=SIZE),
        "rowwise": rowwise,
        "plan": lambda: vb.plan(**call),
        "certify": lambda: vb.certify(**call, microbatch_size=SIZE).raise_if_inexact(),
        "certify_loop": lambda: vb.certify_loop(
            loop, [call["batch"]] * 2, microbatch_size=SIZE, weights=variables
        ).raise_if_inexact(),
    }


def main(engine: str) -> None:
    others = sorted(name for name in FRAMEWORKS - {engine} if importlib.util.find_spec(name))
    if others:
        raise SystemExit(f"No other framework may be installed. Got {', '.join(others)}.")
    verbs = {"tensorflow": tensorflow, "torch": torch, "jax": jax}[engine]()
    public = set(importlib.import_module(f"virtualbatch.{engine}").__all__)
    if missed := public - {"Window", "windows"} - set(verbs):
        raise SystemExit(f"Every public verb must be called. Got no call of {sorted(missed)}.")
    for name, verb in verbs.items():
        verb()
        print(f"{engine}.{name} ran", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
