"""Adapter of the JAX engine."""

from contextlib import contextmanager
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from tests.conformance.adapters.base import Result, is_floating, leaves, mapped

import virtualbatch.jax as vb


class Adapter:
    name = "jax"
    traces = True
    loss_argument = "fun"
    ops = SimpleNamespace(
        tanh=jnp.tanh,
        mean=jnp.mean,
        sum=jnp.sum,
        where=jnp.where,
        take=lambda table, rows: table[rows],
        cast=lambda x, dtype: x.astype(dtype),
        concat=jnp.concatenate,
        uniform=jax.random.uniform,
        matmul=jnp.matmul,
        transpose=jnp.transpose,
        diag=jnp.diagonal,
        eye=lambda rows: jnp.eye(rows, dtype=bool),
        full=lambda value: jnp.asarray(value, "float64"),
        equal=jnp.equal,
        exp=jnp.exp,
        log=jnp.log,
        sqrt=jnp.sqrt,
        relu=jax.nn.relu,
        softplus=jax.nn.softplus,
        logsumexp=jax.nn.logsumexp,
        max=jnp.max,
        min=jnp.min,
        sort=jnp.sort,
    )

    @contextmanager
    def settings(self):
        with jax.enable_x64(True):
            yield

    def array(self, value, dtype="float64"):
        value = np.asarray(value)
        return jnp.asarray(value, dtype if is_floating(value) else None)

    def parameters(self, values, dtype="float64"):
        return mapped(lambda x: self.array(x, dtype), values)

    def values(self, params):
        """Everything that a refused call must leave as it is."""
        return [self.numpy(x) for x in leaves(params)]

    def numpy(self, x):
        if not isinstance(x, jax.Array):
            return x
        return np.array(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

    def program(
        self,
        loss_fn,
        params,
        *,
        compiled=False,
        random=False,
        refuse_reading=None,
        **options,
    ):
        # Inside jit no value can be read, armed or not.
        del refuse_reading
        options |= {"key_argnum": 2} if random else {}
        keys = [jax.random.key(0)] if random else []

        def call(params, batch, *keys):
            return vb.value_and_grad(loss_fn, **options)(params, batch, *keys)

        call = jax.jit(call) if compiled else call

        def run(batch):
            value, gradients, *stats = call(params, batch, *keys)
            value, aux = value if options.get("has_aux") else (value, None)
            found = [float(x) for x in stats[0]] if stats else None
            return self.result(value, gradients, aux)._replace(stats=found)

        return run

    def coupled(self, encode, loss, params, *, compiled=False, **options):
        """A function of a batch: the loss of what `encode` gives, by `rowwise` if given a size."""

        def rows(params, batch):
            return encode(self.ops, params, batch)

        if options:
            rows = vb.rowwise(rows, **options)

        def total(params, batch):
            return loss(self.ops, params, rows(params, batch))

        call = jax.value_and_grad(total)
        call = jax.jit(call) if compiled else call
        return lambda batch: self.result(*call(params, batch), None)

    def plain(self, loss_fn, params, batch):
        def total(params):
            loss = loss_fn(params, batch)
            # JAX gives dicts back in the order of their keys.
            return sum(loss[name] for name in sorted(loss)) if isinstance(loss, dict) else loss

        return self.result(*jax.value_and_grad(total)(params), None)

    def result(self, loss, gradients, aux):
        name = self.dtype
        return Result(
            self.numpy(loss),
            mapped(self.numpy, gradients),
            mapped(self.numpy, aux),
            mapped(name, gradients),
            name(loss),
        )

    def dtype(self, x):
        return None if x is None else str(x.dtype)

    def compilations_so_far(self, runs):
        """How often the loss was traced: each time its Python body ran."""
        return runs
