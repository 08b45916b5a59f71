"""What a training loop has around the call: scalers, autocast, compilers, checkpoints, hooks."""

import copy
import gc
import weakref

import pytest
import torch
from tests.oracle import assert_all_close, assert_close, tolerance
from tests.torch.problems import taken, uncut
from torch import nn
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))


def mlp(*, norm=False):
    middle = nn.BatchNorm1d(4) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 1))


def test_a_grad_scaler():
    cut = mlp().double()
    whole = copy.deepcopy(cut)
    scalers = []
    for model in (cut, whole):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad()
            if model is cut:
                loss = vb.backward(
                    lambda x: cut(x).square().mean(),
                    X.double(),
                    module=cut,
                    microbatch_size=4,
                    backward_fn=lambda loss, scaler=scaler: scaler.scale(loss).backward(),
                )
                assert_close(loss, cut(X.double()).square().mean().detach())
            else:
                scaler.scale(whole(X.double()).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        scalers.append(scaler.get_scale())
    assert scalers == [2.0**12, 2.0**12]
    for a, b in zip(cut.parameters(), whole.parameters(), strict=True):
        assert_close(a.detach(), b.detach())


@pytest.mark.parametrize("bad", range(3))
def test_one_overflow_skips_the_window(bad):
    model = mlp()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = copy.deepcopy(model.state_dict())
    x = X[:9].clone()
    x[3 * bad] = torch.inf
    vb.backward(
        lambda x: model(x).square().mean(),
        x,
        module=model,
        microbatch_size=3,
        backward_fn=lambda loss: scaler.scale(loss).backward(),
    )
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("has_aux", [False, True])
def test_autocast_around_the_call(has_aux):
    model = mlp()
    oracle = copy.deepcopy(model).double()
    expected = uncut(lambda x: oracle(x).square().mean(), X.double(), oracle)[1]
    seen = []

    def loss_fn(x):
        output = model(x)
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        loss = output.float().square().mean()
        return (loss, loss) if has_aux else loss

    def backward_fn(loss):
        seen.append(torch.is_autocast_enabled("cpu"))
        loss.backward()

    with torch.autocast("cpu", torch.bfloat16):
        vb.backward(
            loss_fn,
            X,
            module=model,
            microbatch_size=4,
            weight=lambda x: len(x),
            has_aux=has_aux,
            backward_fn=backward_fn,
        )
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(torch.bfloat16, True), False] * 3
    assert model[0].weight.grad.dtype == torch.float32
    assert_all_close(taken(model), expected, tolerance("bfloat16", 3))


def test_autocast_and_a_micro_batch_without_weight():
    model = mlp()
    weights = iter([0, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        vb.backward(
            lambda x: (model(x).float().mean(), x),
            X[:9],
            module=model,
            microbatch_size=3,
            weight=lambda x: next(weights),
            has_aux=True,
        )
    found = taken(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(X[3:6]).float().mean()
    loss.backward()
    assert_all_close(found, taken(model), 1e-6)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_is_not_compiled_again(backend, norm):
    torch._dynamo.reset()
    # What other tests compiled is counted too.
    torch._dynamo.utils.counters.clear()
    eager = mlp(norm=norm)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend)
    frames = []
    for rows in (11, 11, 11):
        x = torch.randn(rows, 3)
        for found, run in ((eager, eager), (model, compiled)):
            vb.backward(
                lambda x, run=run: run(x).square().mean(), x, module=found, microbatch_size=4
            )
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        assert_all_close(taken(model), taken(eager), 1e-5)
        for a, b in zip(model.buffers(), eager.buffers(), strict=True):
            assert_close(a, b, 1e-6)
    # Sizes 4 and 3 of an even cut are two programs at most; later windows compile nothing.
    assert frames[0] <= 2
    assert frames == [frames[0]] * 3
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("inner", [False, True], ids=["module", "compiled module"])
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_a_compiled_step_around_the_call(inner):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = mlp().double()
    run = torch.compile(model, backend="eager") if inner else model
    sgd = torch.optim.SGD(model.parameters(), 0.0)

    def loss_fn(x):
        return run(x).square().mean()

    @torch.compile(backend="eager")
    def step(x):
        sgd.zero_grad()
        loss = vb.backward(loss_fn, x * 2, module=model, microbatch_size=4)
        return loss + 1

    for rows in (11, 8):
        x = torch.randn(rows, 3, dtype=torch.float64)
        loss = step(x)
        found = taken(model)
        due, expected = uncut(loss_fn, x * 2, model)
        assert_all_close(found, expected)
        assert_close(loss.detach() - 1, due)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = mlp().double()
    dropout = nn.Dropout(0.5)

    def loss_fn(x):
        hidden = model[0](x)
        return (
            model[2](checkpoint(lambda h: dropout(model[1](h)), hidden, use_reentrant=reentrant))
            .square()
            .mean()
        )

    x = X.double()
    torch.manual_seed(1)
    vb.backward(loss_fn, x, module=model, microbatch_size=4)
    found = taken(model)
    torch.manual_seed(1)
    due = sum(loss_fn(part) * len(part) / 11 for part in x.tensor_split([4, 8]))
    due.backward()
    assert_all_close(found, taken(model))


def test_hooks_on_parameters_fire():
    model = mlp().double()
    seen = []
    model[0].weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    vb.backward(lambda x: model(x).square().mean(), X.double(), module=model, microbatch_size=4)
    assert len(seen) == 3
    assert_close(sum(seen), model[0].weight.grad)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_detection():
    model = mlp()
    mask = torch.tensor([0.0, 0, 1, 1])

    def loss_fn(batch):
        return (model(batch[0])[:, 0] * batch[1]).sum() / batch[1].sum()

    with torch.autograd.detect_anomaly(check_nan=True):
        vb.backward(
            loss_fn, (X[:4], mask), module=model, microbatch_size=2, weight=lambda b: b[1].sum()
        )
    assert model[0].weight.grad.isfinite().all()


def test_only_one_graph_is_alive_at_a_time():
    model = mlp()
    graphs = []

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def loss_fn(x):
        # What an earlier micro-batch held is gone before the next forward.
        gc.collect()
        assert [ref() for ref in graphs] == [None] * len(graphs)
        hidden = Marked.apply(model[0](x))
        graphs.append(weakref.ref(hidden))
        return model[1:](hidden).square().mean(), hidden

    vb.backward(
        loss_fn,
        X,
        module=model,
        microbatch_size=2,
        has_aux=True,
        weight=lambda x: float(x[0, 0] > 0),
    )
    assert len(graphs) == 6


def test_torch_functional_losses_and_optimizers_of_several_groups():
    model = mlp(norm=True).double()
    y = torch.arange(11) % 2
    optimizer = torch.optim.Adam(
        [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    loss = vb.backward(
        lambda b: nn.functional.binary_cross_entropy_with_logits(model(b[0])[:, 0], b[1].double()),
        [X.double(), y],
        module=model,
        microbatch_size=4,
    )
    optimizer.step()
    assert loss.isfinite()
