"""An exception in any micro-batch and phase leaves everything as before the call."""

import copy

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
MICROBATCHES = 4


class Mine(Exception):
    """What the user's code raises."""


class Counting(nn.Module):
    """Changes buffers in every way: in place, by assignment."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.last = x.detach().sum(0)[:2]
        return x


def model(dtype=torch.float32):
    layers = [nn.Linear(3, 3), nn.BatchNorm1d(3), Counting(), nn.BatchNorm1d(3, momentum=None)]
    return nn.Sequential(*layers, nn.Linear(3, 1), nn.Linear(2, 2)).to(dtype)


class Before:
    """Everything that must be the same afterwards, by identity and by value."""

    def __init__(self, module):
        self.module = module
        self.now = self.look()
        self.values = copy.deepcopy([x for _, x in self.now if isinstance(x, torch.Tensor)])

    def look(self):
        found = []
        for name, layer in self.module.named_modules():
            found += [(f"{name}.{key}", buffer) for key, buffer in layer._buffers.items()]
            found.append((f"{name}.momentum", getattr(layer, "momentum", None)))
            found += [(f"{name} hook", hook) for hook in layer._forward_hooks.values()]
        for name, parameter in self.module.named_parameters():
            found += [(name, parameter), (f"{name}.grad", parameter.grad)]
        return found

    def check(self):
        after = self.look()
        assert [name for name, _ in after] == [name for name, _ in self.now]
        for (name, was), (_, found) in zip(self.now, after, strict=True):
            assert was is found, name
        tensors = [(name, x) for name, x in after if isinstance(x, torch.Tensor)]
        for (name, found), value in zip(tensors, self.values, strict=True):
            assert torch.equal(found, value), name


def prepared(dtype=torch.float32):
    """A module in the middle of training: statistics, some gradients and a hook are there."""
    module = model(dtype)
    module[1].register_forward_hook(lambda *_: None)
    module[:5](X.to(dtype)).sum().backward()
    module[0].bias.grad = None
    module[4].weight.grad = None
    return module


@pytest.mark.parametrize("at", range(MICROBATCHES))
@pytest.mark.parametrize("phase", ["forward", "norm", "backward", "hook", "backward_fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_micro_batch_and_phase(dtype, phase, at):
    module = prepared(dtype)
    count = {"forward": 0, "norm": 0, "backward": 0, "hook": 0, "backward_fn": 0}

    def reached(here):
        count[here] += 1
        if here == phase and count[here] == at + 1:
            raise Mine

    class Raising(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            reached("backward")
            return gradient

    def loss_fn(x):
        hidden = module[:2](x)
        reached("norm")
        result = Raising.apply(module[2:5](hidden)).square().mean()
        reached("forward")
        return result

    def backward_fn(loss):
        loss.backward()
        reached("backward_fn")

    handle = module[0].weight.register_hook(lambda _: reached("hook"))
    before = Before(module)
    with pytest.raises(Mine):
        vb.backward(
            loss_fn,
            X.to(dtype),
            module=module,
            accumulation_steps=MICROBATCHES,
            backward_fn=backward_fn,
        )
    before.check()
    # The next window is as if nothing had happened.
    handle.remove()
    twin = copy.deepcopy(module)
    phase = None
    for found in (module, twin):
        found.zero_grad()
        loss = vb.backward(
            lambda x, found=found: found[:5](x).square().mean(),
            X.to(dtype),
            module=found,
            accumulation_steps=MICROBATCHES,
        )
        assert loss.isfinite()
    for a, b in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_an_interrupt_is_no_exception_to_this():
    module = prepared()
    calls = []

    def loss_fn(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return module[:5](x).mean()

    before = Before(module)
    with pytest.raises(KeyboardInterrupt):
        vb.backward(loss_fn, X, module=module, microbatch_size=2)
    before.check()


def test_a_loss_that_is_refused_late():
    module = prepared()
    before = Before(module)
    results = iter([None, lambda loss: {"other": loss}])

    def loss_fn(x):
        change = next(results)
        loss = module[:5](x).mean()
        return change(loss) if change else {"one": loss}

    with pytest.raises(ValueError, match="same terms as the loss"):
        vb.backward(loss_fn, X, module=module, microbatch_size=4, weight=lambda x: {"one": len(x)})
    before.check()


def test_an_aux_that_is_refused_late():
    module = prepared()
    before = Before(module)
    with pytest.raises(TypeError, match="one entry per row"):
        vb.backward(
            lambda x: (module[:5](x).mean(), "text"),
            X,
            module=module,
            microbatch_size=4,
            has_aux=True,
        )
    before.check()


def test_a_failing_weight():
    module = prepared()
    before = Before(module)

    def weight(x):
        raise Mine

    with pytest.raises(Mine):
        vb.backward(
            lambda x: module[:5](x).mean(), X, module=module, microbatch_size=4, weight=weight
        )
    before.check()


def test_random_generators_go_on_from_where_they_are():
    # A loss may draw from any generator, of which PyTorch knows only its own.
    module = nn.Linear(3, 1)
    drawn = []

    def loss_fn(x):
        drawn.append(torch.rand(2))
        if len(drawn) == 2:
            raise Mine
        return module(x).mean()

    torch.manual_seed(3)
    with pytest.raises(Mine):
        vb.backward(loss_fn, X, module=module, microbatch_size=2)
    drawn.append(torch.rand(2))
    torch.manual_seed(3)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.rand(2) for _ in range(3)]))


def test_buffers_of_a_window_that_succeeds_are_the_users():
    module = model()
    vb.backward(lambda x: module[:5](x).mean(), X, module=module, microbatch_size=2)
    assert module[2].calls == 4
