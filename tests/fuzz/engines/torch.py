"""The verbs of the PyTorch engine, and what only it can be given wrongly."""

from functools import partial
from random import Random
from typing import Any

import numpy as np
import torch
from tests.fuzz import batches, functions, options, torch_losses
from tests.fuzz.call import Call, Fault, Result
from tests.fuzz.losses import in_terms, joined, right_entries, right_loss, with_aux

import virtualbatch.torch as vb
from virtualbatch import Window

COMMON = frozenset({"microbatch_size", "accumulation_steps", "weight", "has_aux"})
WINDOW = COMMON | {"stats", "check", "group", "reduce", "accumulator_dtype"}
ALLOWED = {
    "backward": WINDOW | {"backward_fn"},
    "loss": WINDOW | {"scaler"},
    "certify": COMMON,
    "plan": frozenset({"weight", "has_aux", "memory_limit", "backward_fn"}),
    "rowwise": frozenset({"microbatch_size", "accumulation_steps", "check"}),
}


class Net(torch.nn.Module):
    """Three numbers and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))


class Ops:
    """What the user's functions compute with."""

    def array(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(values)

    def mean_of(self, leaf: Any, trained: Net) -> torch.Tensor:
        w, x = trained.weight, self.rows(leaf)
        return ((x * w[0] - w[1]) ** 2 + x * w[2]).mean()

    def constant(self, trained: Net) -> torch.Tensor:
        return trained.weight.square().sum()

    def cast(self, value: torch.Tensor, dtype: str) -> torch.Tensor:
        return value.to(getattr(torch, dtype))

    def rows(self, leaf: Any) -> torch.Tensor:
        x = torch.as_tensor(leaf).to(torch.float64)
        return x.reshape(x.shape[0], -1).mean(1)

    def largest(self, leaf: Any) -> torch.Tensor:
        return torch.as_tensor(leaf).max()

    def joined(self, leaves: Any) -> torch.Tensor:
        return torch.cat(leaves)


class Torch:
    """The engine."""

    name = "torch"
    verbs = ("backward", "backward", "loss", "certify", "plan", "rowwise")

    def __init__(self) -> None:
        self.faults = [
            *batches.FAULTS,
            *functions.FAULTS,
            *options.FAULTS,
            *own_faults(),
        ]

    def call(self, verb: str, random: Random) -> Call:
        # A loss of the case before may have turned it off.
        torch.set_grad_enabled(True)
        ops, net = Ops(), Net()
        if random.random() < 0.5:
            net.weight.grad = torch.ones_like(net.weight)
        x, y = batches.arrays(ops)
        given: dict[str, Any] = {}
        if verb != "plan":
            given["microbatch_size"] = random.choice([2, 3, 4, 6])
        loss: Any = partial(right_entries if verb == "rowwise" else right_loss, ops, net)
        if verb != "rowwise":
            if random.random() < 0.25:
                loss = in_terms(loss)
            elif random.random() < 0.25:
                loss, given["has_aux"] = with_aux(loss, ops), True
        return Call(verb, ops, {"x": x, "y": y}, loss, net, given, ALLOWED[verb], weights=net)

    def uncut(self, call: Call) -> Result:
        if call.is_empty:
            return self._result(call, torch.zeros(()), None)
        batch = call.batch
        if isinstance(batch, Window):
            batch = joined(call.ops, batch)
        result, aux = call.loss(batch), None
        if call.verb == "rowwise":
            return self._of_rows(call, result)
        if call.options.get("has_aux"):
            result, aux = result
        if isinstance(result, dict):
            result = sum(result.values())
        result.backward()
        return self._result(call, result, aux)

    def run(self, call: Call) -> Result | None:
        given = {"module": call.trained} | call.options
        match call.verb:
            case "plan":
                vb.plan(call.loss, call.batch, **given)
                return None
            case "certify":
                if not vb.certify(call.loss, call.batch, **given).exact:
                    return None
                found = vb.backward(call.loss, call.batch, check=False, **given)
            case "rowwise":
                return self._of_rows(call, vb.rowwise(call.loss, **given)(call.batch))
            case "loss":
                found = vb.loss(call.loss, call.batch, **given)
                loss = found[0] if isinstance(found, tuple) else found
                loss.backward()
            case _:
                found = vb.backward(call.loss, call.batch, **given)
        parts = found if isinstance(found, tuple) else (found,)
        aux = parts[1] if call.options.get("has_aux") else None
        return self._result(call, parts[0], aux)

    def _of_rows(self, call: Call, found: Any) -> Result:
        """What rows give, and the gradients of their sum."""
        leaves = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(found)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        ]
        total = sum(leaf.sum() for leaf in leaves)
        if leaves:
            total.backward()
        return self._result(call, total, found)

    def _result(self, call: Call, loss: torch.Tensor, aux: Any) -> Result:
        leaves = torch.utils._pytree.tree_leaves(aux)
        grads = [p.grad for p in call.weights.parameters()]
        return Result(_numpy(loss), list(map(_numpy, grads)), list(map(_numpy, leaves)))

    def state(self, call: Call) -> dict[str, Any]:
        net = call.weights
        return {
            "weight": _numpy(net.weight),
            "grad": _numpy(net.weight.grad),
            "seen": _numpy(net.seen),
            "requires_grad": net.weight.requires_grad,
            "training": net.training,
            "grad mode": torch.is_grad_enabled(),
            "hooks": str([*net._forward_hooks, *(net.weight._backward_hooks or ())]),
            "attributes": str(sorted(vars(net))),
        }


def _numpy(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().resolve_conj()
    value = value.to_dense() if value.layout is torch.sparse_coo else value
    return value.to(torch.float32).numpy() if value.dtype is torch.bfloat16 else np.array(value)


def own_faults() -> list[Fault]:
    """What only PyTorch knows."""

    def batch(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            x, y = batches.arrays(call.ops)
            call.batch = make(call, x, y)

        return Fault(f"batch: {name}", "batch", change)

    def loss(name: str) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.loss = partial(torch_losses.LOSSES[name], call, call.loss)
            call.is_judged = call.is_judged and name not in torch_losses.LEAVES_TRACES
            # What the loss does to the module by itself is not undone.
            call.keeps_state = name not in torch_losses.LEAVES_TRACES

        return Fault(f"loss: {name}", "loss", change)

    def module(name: str, make: Any) -> Fault:
        def change(call: Call, random: Random) -> None:
            call.trained = make(call)

        return Fault(f"module: {name}", "trained", change)

    def frozen(call: Call) -> Net:
        call.weights.requires_grad_(False)
        return call.weights

    return [
        batch("a graph", lambda c, x, y: {"x": x * c.weights.weight, "y": y}),
        batch("a graph of its own", lambda c, x, y: [x.clone().requires_grad_() * 2, y]),
        batch("a leaf with gradient", lambda c, x, y: [x.clone().requires_grad_(), y]),
        batch("a parameter", lambda c, x, y: [torch.nn.Parameter(x), y]),
        batch("sparse", lambda c, x, y: {"x": x.to_sparse(), "y": y}),
        batch("sparse rows", lambda c, x, y: {"x": x.to_sparse_csr(), "y": y}),
        batch("nested", lambda c, x, y: {"x": torch.nested.nested_tensor([x[0], x[1]]), "y": y}),
        batch("on no device", lambda c, x, y: {"x": x.to("meta"), "y": y}),
        batch("expanded", lambda c, x, y: {"x": x[:1].expand(6, 3), "y": y}),
        batch("turned", lambda c, x, y: {"x": x.T.contiguous().T, "y": y}),
        batch("views", lambda c, x, y: [x, x[:, 0], x.view(-1)[:6]]),
        batch(
            "quantized",
            lambda c, x, y: [torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8), y],
        ),
        batch("inference tensors", lambda c, x, y: _inference(x, y)),
        batch(
            "packed",
            lambda c, x, y: torch.nn.utils.rnn.pack_padded_sequence(
                x[..., None], torch.tensor([3, 3, 2, 2, 1, 1]), batch_first=True
            ),
        ),
        batch("a module", lambda c, x, y: {"x": x, "m": c.weights}),
        batch("a size", lambda c, x, y: {"x": x, "s": x.size()}),
        batch("a loader", lambda c, x, y: torch.utils.data.DataLoader([1, 2])),
        batch("a storage", lambda c, x, y: {"x": x, "s": x.untyped_storage()}),
        *map(loss, torch_losses.LOSSES),
        module("None", lambda c: None),
        module("nothing", lambda c: []),
        module("a number", lambda c: 3),
        module("text", lambda c: "net"),
        module("a class", lambda c: Net),
        module("frozen", frozen),
        module("another", lambda c: torch.nn.Linear(2, 1)),
        module("with None", lambda c: [c.weights, None]),
        module("a generator", lambda c: iter([c.weights])),
        module("parameters", lambda c: c.weights.parameters()),
        module("named parameters", lambda c: c.weights.named_parameters()),
        module("a state", lambda c: c.weights.state_dict()),
        module("a dict", lambda c: {"net": c.weights}),
        module("a tensor", lambda c: torch.ones(2)),
        module("twice", lambda c: [c.weights, c.weights]),
        module("lazy", lambda c: [c.weights, torch.nn.LazyLinear(2)]),
        module("an optimizer", lambda c: torch.optim.SGD(c.weights.parameters(), lr=1.0)),
        *options.option("group", options.WORDS),
        *options.option("reduce", options.WORDS),
        *options.option(
            "accumulator_dtype",
            {
                **options.WORDS,
                "int": torch.int32,
                "complex": torch.complex64,
                "name": "float16",
                "half": torch.float16,
                "wide": torch.float64,
            },
        ),
        *options.option(
            "backward_fn",
            {**options.WORDS, "nothing": lambda loss: None, "right": lambda loss: loss.backward()},
        ),
        *options.option("scaler", options.WORDS),
    ]


def _inference(x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    with torch.inference_mode():
        return {"x": x * 1, "y": y * 1}
