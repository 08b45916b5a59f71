"""Adapter of the PyTorch engine."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from tests.conformance.adapters.base import Result, is_floating, leaves, mapped
from torch.utils._python_dispatch import TorchDispatchMode

import virtualbatch.torch as vb


def axes(reduce):
    return lambda x, axis=None: reduce(x) if axis is None else reduce(x, axis)


class RefuseReading(TorchDispatchMode):
    """Refuses to bring a value to the host once it is armed."""

    def __init__(self, armed):
        super().__init__()
        self.armed = armed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_host = (kwargs or {}).get("device") == torch.device("cpu") and args[0].device.type
        reads = func is torch.ops.aten._local_scalar_dense.default or to_host not in (False, "cpu")
        if reads and self.armed():
            raise AssertionError(f"the host reads a value by {func}")
        return func(*args, **(kwargs or {}))


class Adapter:
    name = "torch"
    traces = False
    loss_argument = "loss_fn"
    ops = SimpleNamespace(
        tanh=torch.tanh,
        mean=axes(torch.mean),
        sum=axes(torch.sum),
        where=torch.where,
        take=lambda table, rows: table[rows],
        cast=lambda x, dtype: x.to(getattr(torch, dtype)),
        concat=torch.cat,
        uniform=lambda key, shape: torch.rand(shape),
        matmul=torch.matmul,
        transpose=lambda x: x.T,
        diag=torch.diagonal,
        eye=lambda rows: torch.eye(rows, dtype=torch.bool),
        full=lambda value: torch.tensor(value, dtype=torch.float64),
        equal=torch.eq,
        exp=torch.exp,
        log=torch.log,
        sqrt=torch.sqrt,
        relu=torch.relu,
        softplus=torch.nn.functional.softplus,
        logsumexp=torch.logsumexp,
        max=torch.amax,
        min=torch.amin,
        sort=lambda x: torch.sort(x).values,
    )

    def __init__(self):
        self.compilations = 0

    @contextmanager
    def settings(self):
        torch.manual_seed(0)
        yield

    def array(self, value, dtype="float64"):
        value = np.asarray(value)
        return torch.tensor(value, dtype=getattr(torch, dtype) if is_floating(value) else None)

    def parameters(self, values, dtype="float64"):
        return mapped(lambda x: torch.nn.Parameter(self.array(x, dtype)), values)

    def values(self, params):
        """Everything that a refused call must leave as it is."""
        held = [(p, p.grad) for p in leaves(params)]
        return [self.numpy(x) for pair in held for x in pair if x is not None]

    def numpy(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        return (x.detach().double() if x.is_floating_point() else x).to_dense().numpy().copy()

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
        guard = RefuseReading(refuse_reading) if refuse_reading else nullcontext()
        module = torch.nn.ParameterList(leaves(params))
        backend = self._counted if compiled else None
        if callable(loss_fn):

            def forward(batch):
                return loss_fn(params, batch, None) if random else loss_fn(params, batch)

            if compiled:
                torch._dynamo.reset()
            loss = torch.compile(forward, backend=backend) if compiled else forward
        else:
            loss = loss_fn

        def run(batch):
            before = [p.grad for p in leaves(params)]
            found = self.differentiated(loss, batch, guard, module=module, **options)
            found = list(found) if isinstance(found, tuple) else [found]
            stats = [float(x) for x in found.pop()] if options.get("stats") else None
            value, aux = found if options.get("has_aux") else (*found, None)
            result = self.result(value, mapped(lambda p: p.grad, params), aux)
            result = result._replace(stats=stats)
            for parameter, gradient in zip(leaves(params), before, strict=True):
                parameter.grad = gradient
            return result

        return run

    def differentiated(self, loss, batch, guard, **options):
        """What the engine returns; gradients are in `.grad` afterwards."""
        with guard:
            return vb.backward(loss, batch, **options)

    def coupled(self, encode, loss, params, *, compiled=False, **options):
        """A function of a batch: the loss of what `encode` gives, by `rowwise` if given a size."""

        def rows(batch):
            return encode(self.ops, params, batch)

        if compiled:
            torch._dynamo.reset()
            rows = torch.compile(rows, backend=self._counted)
        module = torch.nn.ParameterList(leaves(params))
        if options:
            rows = vb.rowwise(rows, module=module, **options)

        def run(batch):
            value = self.of_all_rows(
                lambda batch: loss(self.ops, params, rows(batch)), batch, module
            )
            gradients = torch.autograd.grad(value, leaves(params), allow_unused=True)
            found = iter(gradients)
            return self.result(value, mapped(lambda _: next(found), params), None)

        return run

    def of_all_rows(self, loss, batch, module):
        """A loss that sees all rows, to be differentiated."""
        return loss(batch)

    def plain(self, loss_fn, params, batch):
        loss = loss_fn(params, batch)
        loss = sum(loss.values()) if isinstance(loss, dict) else loss
        gradients = torch.autograd.grad(loss, leaves(params), allow_unused=True)
        found = iter(gradients)
        return self.result(loss, mapped(lambda _: next(found), params), None)

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
        return None if x is None else str(x.dtype).removeprefix("torch.")

    def _counted(self, graph, example_inputs):
        self.compilations += 1
        return graph.forward

    def compilations_so_far(self, runs):
        """How often the loss was compiled; runs of its Python body say nothing here."""
        return self.compilations
