"""Ways to make the updates of a batch in JAX. All are jitted and donate what they update."""

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import virtualbatch.jax as vb
from virtualbatch.bench.case import Case
from virtualbatch.bench.contender import (
    FLOOR,
    OURS,
    PEER,
    VIRTUALBATCH,
    WHOLE,
    WHOLE_BATCH,
    Absent,
    Contender,
    looped,
)
from virtualbatch.bench.jax_models import Problem, contrastive_loss, problem

# (problem, rows of a micro-batch) -> (params, batch) -> (loss, gradients).
_Way = Callable[[Problem, int], Callable[[Any, Any], Any]]


def entries(case: Case) -> list[Contender | Absent]:
    """All contenders that can run a case, each with its own parameters."""
    given = problem(case)
    size = case.microbatch_size
    if case.model == "pairs":
        return _of_pairs(case, given)
    found: list[Contender | Absent] = [
        _contender(VIRTUALBATCH, OURS, given, ours(given, size)),
        _contender("forward, backward in a scan, one update", FLOOR, given, _floor(given, size)),
        _called(given, size),
        _contender(WHOLE_BATCH, WHOLE, given, jax.value_and_grad(given.loss)),
        _contender("hand-written scan", PEER, given, _by_hand(given, size)),
        _multi_steps(case, given),
    ]
    if importlib.util.find_spec("optax.microbatching") is None:
        found.append(Absent("optax.microbatching", "optax>=0.2.8"))
    else:
        way = _microbatching(given, size)
        found.append(_contender("optax.microbatching", PEER, given, way))
    return found


def _of_pairs(case: Case, given: Problem) -> list[Contender | Absent]:
    """The contenders for a loss that couples rows.

    For such a loss, the mean over micro-batches is another loss.
    """
    size = case.microbatch_size
    encode = vb.rowwise(given.logits, microbatch_size=size)
    by_rows = jax.value_and_grad(contrastive_loss(encode))
    return [
        _contender(VIRTUALBATCH, OURS, given, by_rows),
        _contender("forward, backward in a scan, one update", FLOOR, given, _floor(given, size)),
        _contender(WHOLE_BATCH, WHOLE, given, jax.value_and_grad(given.loss)),
        _contender("mean of micro-batches in a scan", PEER, given, _by_hand(given, size)),
        _multi_steps(case, given),
    ]


class _State:
    """Parameters and optimizer state, which each update replaces."""

    def __init__(self, given: Problem, optimizer: Any):
        # Copy, because a donated array is lost after the call.
        self.params = jax.tree.map(jnp.copy, given.params)
        self.optimizer = optimizer.init(self.params)

    def weights(self) -> list[np.ndarray[Any, Any]]:
        return [np.array(leaf) for leaf in jax.tree.leaves(self.params)]


def _update(gradients: Callable[[Any, Any], Any], optimizer: Any) -> Callable[..., Any]:
    @partial(jax.jit, donate_argnums=(0, 1))
    def run(params: Any, state: Any, batch: Any) -> Any:
        loss, found = gradients(params, batch)
        changes, state = optimizer.update(found, state, params)
        return optax.apply_updates(params, changes), state, loss

    return run


def _contender(
    name: str, role: str, given: Problem, gradients: Callable[[Any, Any], Any]
) -> Contender:
    state = _State(given, given.optimizer)
    run = _update(gradients, given.optimizer)

    def update() -> Any:
        state.params, state.optimizer, loss = run(state.params, state.optimizer, given.batch)
        return loss

    return Contender(name, role, looped(update, jax.block_until_ready), state.weights)


def ours(given: Problem, size: int) -> Callable[[Any, Any], Any]:
    """(parameters, batch) -> (loss, gradients) by `virtualbatch.jax`."""
    return vb.value_and_grad(given.loss, microbatch_size=size, weight=given.weight)


def _cut(batch: Any, size: int) -> Any:
    return jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)


def _floor(given: Problem, size: int) -> Callable[[Any, Any], Any]:
    """Computes the gradient of every micro-batch in a scan, and keeps only the last one."""

    def gradients(params: Any, batch: Any) -> Any:
        def body(latest: Any, piece: Any) -> Any:
            return jax.value_and_grad(given.loss)(params, piece), None

        first = (jnp.zeros(()), params)
        return lax.scan(body, first, _cut(batch, size))[0]

    return gradients


def _called(given: Problem, size: int) -> Contender:
    """The floor without a loop in the program, because convolutions in it are slow on CPU."""
    state = _State(given, given.optimizer)
    step = jax.jit(jax.value_and_grad(given.loss))
    pieces = list(zip(*map(list, _cut(given.batch, size)), strict=True))

    @partial(jax.jit, donate_argnums=(0, 1))
    def apply(params: Any, optimizer: Any, gradients: Any) -> Any:
        changes, optimizer = given.optimizer.update(gradients, optimizer, params)
        return optax.apply_updates(params, changes), optimizer

    def update() -> Any:
        for piece in pieces:
            loss, found = step(state.params, piece)
        state.params, state.optimizer = apply(state.params, state.optimizer, found)
        return loss, state.params

    wait = looped(update, jax.block_until_ready)
    return Contender("forward, backward called, one update", FLOOR, wait, state.weights)


def _by_hand(given: Problem, size: int) -> Callable[[Any, Any], Any]:
    """A correct scan: each mean is scaled by the micro-batch's share of the weight."""

    def gradients(params: Any, batch: Any) -> Any:
        cut = _cut(batch, size)
        everything = len(batch[0]) if given.weight is None else given.weight(batch)

        def body(total: Any, piece: Any) -> Any:
            part = len(piece[0]) if given.weight is None else given.weight(piece)
            share = part / everything

            def scaled(params: Any) -> Any:
                return given.loss(params, piece) * share

            return jax.tree.map(jnp.add, total, jax.value_and_grad(scaled)(params)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return lax.scan(body, zero, cut)[0]

    return gradients


def _multi_steps(case: Case, given: Problem) -> Contender:
    """Optax' optimizer that counts micro-batches. It is called once per micro-batch."""
    optimizer = optax.MultiSteps(given.optimizer, case.accumulation_steps)
    state = _State(given, optimizer)
    run = _update(jax.value_and_grad(given.loss), optimizer)
    pieces = list(zip(*map(list, _cut(given.batch, case.microbatch_size)), strict=True))

    def update() -> Any:
        for piece in pieces:
            state.params, state.optimizer, loss = run(state.params, state.optimizer, piece)
        return loss, state.params

    train = looped(update, jax.block_until_ready)
    return Contender("optax.MultiSteps, donated", PEER, train, state.weights)


def _microbatching(given: Problem, size: int) -> Callable[[Any, Any], Any]:
    # Optax before 0.2.8 does not have this module.
    microbatching = importlib.import_module("optax.microbatching")
    return microbatching.microbatch(
        jax.value_and_grad(given.loss),
        argnums=1,
        microbatch_size=size,
        accumulator=microbatching.AccumulationType.MEAN,
    )
