"""Calls that are interrupted: every way in which a window may run, on small nested modules."""

from collections.abc import Callable
from typing import Any

import torch
from tests.torch.interrupts import Subject
from torch import nn

import virtualbatch.torch as vb
from virtualbatch import Window

ROWS = 8


class Counting(nn.Module):
    """Changes buffers in place and by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().sum(0)[:2]
        return x


def nested(dtype=torch.float32, *, batchnorm=True, grads=True):
    """A model in the middle of training: statistics, some gradients and a hook are there."""
    torch.manual_seed(0)
    norms = (nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=None)) if batchnorm else ()
    inner = nn.Sequential(Counting(), nn.Linear(3, 3), *norms[1:])
    model = nn.Sequential(nn.Linear(3, 3), *norms[:1], inner, nn.Linear(3, 1)).to(dtype)
    if grads:
        model(rows(dtype)).sum().backward()
        model[0].bias.grad = None
        model[-1].weight.grad = None
    model[-1].register_forward_hook(lambda *_: None)
    return model


def rows(dtype=torch.float32):
    return torch.linspace(-1.0, 1.0, 3 * ROWS).reshape(ROWS, 3).sin().to(dtype)


def window(model, **given) -> Callable[[], Subject]:
    def make():
        torch.manual_seed(1)
        module = model()
        dtype = next(module.parameters()).dtype
        options: dict[str, Any] = {"microbatch_size": 4, "check": False, **given}
        options = {k: v(module) if k == "loss_fn" else v for k, v in options.items()}
        loss_fn = options.pop("loss_fn", lambda x: (module(x) ** 2).mean())
        x = rows(dtype)
        batch = Window([x[:5], x[5:]]) if options["microbatch_size"] is None else x
        return Subject([module], [x], lambda: vb.backward(loss_fn, batch, module=module, **options))

    return make


def with_aux(module):
    def loss_fn(x):
        out = module(x)
        return (out**2).mean(), {"out": out}

    return loss_fn


def terms(module):
    return lambda x: {"a": module(x).mean(), "b": (module(x) ** 2).mean()}


def out_of_memory_once(module):
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        found = (module(x) ** 2).mean()
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")
        return found

    return loss_fn


def autocast(make):
    return lambda: make()._replace(around=lambda: torch.autocast("cpu", torch.bfloat16))


def handed_over():
    module = nested()
    module[0].weight.register_hook(lambda gradient: None)
    x = rows()

    def call():
        found = vb.loss(
            lambda x: (module(x) ** 2).mean(), x, module=module, microbatch_size=4, check=False
        )
        assert found.requires_grad

    return Subject([module], [x], call)


def evaluated():
    module = nested()
    x = rows()

    def call():
        vb.loss(lambda x: module(x).mean(), x, module=module, microbatch_size=4, check=False)

    return Subject([module], [x], call, torch.no_grad)


def rowwise_forward():
    module = nested()
    x = rows()
    encode = vb.rowwise(module, microbatch_size=4, check=False)
    return Subject([module], [x], lambda: encode(x))


def rowwise_backward():
    module = nn.Sequential(nested(), nn.Dropout(0.5))
    module[0][0].weight.register_hook(lambda gradient: None)
    torch.manual_seed(2)
    x = rows()
    loss = vb.rowwise(module, microbatch_size=4, check=False)(x).logsumexp(0).sum()
    module.eval()
    module[0][0].weight.requires_grad_(False)
    return Subject([module], [x], loss.backward)


def sparse():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 1))
    x = torch.arange(ROWS) % 5
    module(x).sum().backward()
    return Subject(
        [module],
        [],
        lambda: vb.backward(
            lambda x: (module(x) ** 2).mean(), x, module=module, microbatch_size=4, check=False
        ),
    )


def input_gradients():
    module = nested(batchnorm=False)
    x = rows().requires_grad_()
    x.grad = torch.ones_like(x)

    def call():
        found = vb.loss(
            lambda x: (module(x) ** 2).mean(), x, module=module, microbatch_size=4, check=False
        )
        assert found.requires_grad

    return Subject([module], [x], call)


def certified(**given):
    def make():
        module = nn.Sequential(nested(), nn.Dropout(0.5))
        torch.manual_seed(2)
        x = rows()
        return Subject(
            [module],
            [x],
            lambda: vb.certify(
                lambda x: module(x).mean(), x, module=module, microbatch_size=4, **given
            ),
        )

    return make


def planned():
    module = nested()
    x = rows()
    return Subject([module], [x], lambda: vb.plan(lambda x: module(x).mean(), x, module=module))


def first_window(dropout):
    def make():
        module = nn.Sequential(nested(), nn.Dropout(0.5 if dropout else 0.0))
        torch.manual_seed(2)
        x = rows()

        def loss_fn(x):
            return (module(x) ** 2).mean()

        return Subject(
            [module],
            [x],
            lambda: vb.backward(loss_fn, x, module=module, microbatch_size=4),
        )

    return make


def bf16():
    return nested(torch.bfloat16)


def plain():
    return nested(batchnorm=False)


# Name -> a new subject, the same each time.
WINDOWS: dict[str, Callable[[], Subject]] = {
    "float32": window(nested),
    "no grad before": window(lambda: nested(grads=False)),
    "one micro-batch": window(nested, microbatch_size=8),
    "bfloat16": window(bf16),
    "bfloat16, no grad before": window(lambda: nested(torch.bfloat16, grads=False)),
    "bfloat16 sums": window(bf16, accumulator_dtype="bfloat16"),
    "stats": window(nested, stats=True),
    "has_aux": window(nested, has_aux=True, loss_fn=with_aux),
    "terms": window(plain, loss_fn=terms),
    "backward_fn": window(nested, backward_fn=lambda loss: loss.backward()),
    "Window": window(nested, microbatch_size=None),
    "out of memory": window(nested, loss_fn=out_of_memory_once),
    "autocast": autocast(window(plain)),
    "loss": handed_over,
    "loss of inputs": input_gradients,
    "loss without gradients": evaluated,
    "rowwise": rowwise_forward,
    "rowwise backward": rowwise_backward,
    "sparse": sparse,
}
# What takes longer: the same, and whatever tries, plans and certifies.
LONG: dict[str, Callable[[], Subject]] = {
    "first window": first_window(dropout=False),
    "first window with dropout": first_window(dropout=True),
    "certify": certified(),
    "plan": planned,
}
