"""Adapter of the TensorFlow engine."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import tensorflow as tf
from tests.conformance.adapters.base import Result, is_floating, leaves, mapped

import virtualbatch.tensorflow as vb


class Adapter:
    name = "tensorflow"
    traces = True
    loss_argument = "loss_fn"
    ops = SimpleNamespace(
        tanh=tf.tanh,
        mean=tf.reduce_mean,
        sum=tf.reduce_sum,
        where=tf.where,
        take=tf.gather,
        cast=tf.cast,
        concat=lambda pieces: tf.concat(pieces, 0),
        uniform=lambda key, shape: tf.random.uniform(shape),
        matmul=tf.matmul,
        transpose=tf.transpose,
        diag=tf.linalg.diag_part,
        eye=lambda rows: tf.eye(rows) > 0,
        full=lambda value: tf.constant(value, tf.float64),
        equal=tf.equal,
        exp=tf.exp,
        log=tf.math.log,
        sqrt=tf.sqrt,
        relu=tf.nn.relu,
        softplus=tf.math.softplus,
        logsumexp=tf.reduce_logsumexp,
        max=tf.reduce_max,
        min=tf.reduce_min,
        sort=tf.sort,
    )

    def settings(self):
        tf.random.set_seed(0)
        return nullcontext()

    def array(self, value, dtype="float64"):
        value = np.asarray(value)
        return tf.constant(value, dtype if is_floating(value) else None)

    def parameters(self, values, dtype="float64"):
        return mapped(lambda x: tf.Variable(self.array(x, dtype)), values)

    def values(self, params):
        """Everything that a refused call must leave as it is."""
        return [self.numpy(x) for x in leaves(params)]

    def numpy(self, x):
        if isinstance(x, tf.IndexedSlices | tf.Variable):
            x = tf.convert_to_tensor(x)
        if not tf.is_tensor(x):
            return x
        return np.array(tf.cast(x, tf.float64) if x.dtype.is_floating else x)

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
        # Inside tf.function no value can be read, armed or not.
        del refuse_reading
        loss = loss_fn
        if callable(loss_fn):

            def loss(batch):
                return loss_fn(params, batch, None) if random else loss_fn(params, batch)

        def call(batch):
            return vb.value_and_gradients(loss, batch, params, **options)

        # XLA on request; every case would take seconds.
        call = tf.function(call, jit_compile=compiled == "xla") if compiled else call

        def run(batch):
            value, gradients, *stats = call(batch)
            value, aux = value if options.get("has_aux") else (value, None)
            found = [float(x) for x in stats[0]] if stats else None
            return self.result(value, gradients, aux)._replace(stats=found)

        return run

    def coupled(self, encode, loss, params, *, compiled=False, **options):
        """A function of a batch: the loss of what `encode` gives, by `rowwise` if given a size."""

        def rows(batch):
            return encode(self.ops, params, batch)

        if options:
            rows = vb.rowwise(rows, **options)

        def call(batch):
            with tf.GradientTape() as tape:
                value = loss(self.ops, params, rows(batch))
            return value, tape.gradient(value, params)

        call = tf.function(call, jit_compile=compiled == "xla") if compiled else call
        return lambda batch: self.result(*call(batch), None)

    def plain(self, loss_fn, params, batch):
        with tf.GradientTape() as tape:
            loss = loss_fn(params, batch)
            loss = tf.add_n(list(loss.values())) if isinstance(loss, dict) else loss
        return self.result(loss, tape.gradient(loss, params), None)

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
        return None if x is None else x.dtype.name

    def compilations_so_far(self, runs):
        """How often the loss was traced: each time its Python body ran."""
        return runs
