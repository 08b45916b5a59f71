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
