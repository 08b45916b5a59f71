"""A window behind one node: what a backward pass through `loss` hands over, and to whom."""

import copy
import weakref

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def mean_square(module):
    return lambda x: module(x).square().mean()


def uncut(module, rows=X):
    """What the whole batch gives an untouched copy of a module."""
    module = copy.deepcopy(module)
    module.zero_grad()
    loss = mean_square(module)(rows)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in module.parameters()]


def assert_gradients(module, due, factor=1.0):
    for parameter, gradient in zip(module.parameters(), due, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-12, atol=1e-15)


def ours(module, rows=X, size=3, **options):
    return vb.loss(mean_square(module), rows, module=module, microbatch_size=size, **options)


def test_nothing_reaches_a_gradient_before_the_backward_pass():
    module = network()
    kept = [torch.ones_like(parameter) for parameter in module.parameters()]
    for parameter, gradient in zip(module.parameters(), kept, strict=True):
        parameter.grad = gradient.clone()
    loss = ours(module)
    assert_gradients(module, kept)
    places = [parameter.grad.data_ptr() for parameter in module.parameters()]
    loss.backward()
    due_loss, due = uncut(module)
    torch.testing.assert_close(loss.detach(), due_loss, rtol=1e-12, atol=0)
    assert_gradients(module, [a + b for a, b in zip(kept, due, strict=True)])
    assert [parameter.grad.data_ptr() for parameter in module.parameters()] == places


def test_whatever_is_computed_of_the_loss_is_differentiated():
    module = network()
    loss = ours(module)
    (3 * loss + loss**2).backward()
    _, due = uncut(module)
    assert_gradients(module, due, 3 + 2 * float(loss.detach()))


def test_gradients_are_handed_over_without_a_copy():
    module = network()
    seen = []
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    ours(module).backward()
    assert sorted(seen) == sorted(parameter.grad.data_ptr() for parameter in module.parameters())


def test_a_second_backward_pass_is_refused():
    module = network()
    loss = ours(module)
    loss.backward(retain_graph=True)
    _, due = uncut(module)
    with pytest.raises(RuntimeError, match=r"handed over once\. Got a second .* Call loss\("):
        loss.backward()
    assert_gradients(module, due)


def test_a_backward_pass_that_is_to_be_differentiated_is_refused():
    module = network()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(ours(module), list(module.parameters()), create_graph=True)


def test_a_dropped_loss_frees_everything():
    module = network()
    loss = ours(module)
    gradients = [weakref.ref(gradient) for gradient in loss.grad_fn.finished._gradients]
    del loss
    assert all(gradient() is None for gradient in gradients)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_hooks_hear_the_whole_gradient_once():
    module, heard = network(), []
    for parameter in module.parameters():
        parameter.register_hook(lambda gradient: heard.append(gradient) or gradient * 0.5)
    loss = ours(module)
    assert not heard
    loss.backward()
    _, due = uncut(module)
    assert len(heard) == len(due)
    assert_gradients(module, due, 0.5)


@pytest.mark.parametrize("where", ["parameter", "node"])
def test_an_optimizer_in_the_backward_pass_steps_once(where):
    module, plain = network(), network()
    steps = []

    def stepping(parameter):
        optimizer = torch.optim.AdamW([parameter], lr=0.1)

        def step(*_):
            steps.append(parameter)
            optimizer.step()
            optimizer.zero_grad()

        return step

    nodes = []
    for parameter in module.parameters():
        if where == "parameter":
            parameter.register_post_accumulate_grad_hook(stepping(parameter))
        else:
            node = torch.autograd.graph.get_gradient_edge(parameter).node
            node.register_hook(stepping(parameter))
            nodes.append(node)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for _ in range(3):
        ours(module).backward()
        reference.zero_grad()
        mean_square(plain)(X).backward()
        reference.step()
    assert len(steps) == 3 * len(list(module.parameters()))
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_hooks_are_there_again_after_an_error():
    module, heard = network(), []
    module[0].weight.register_hook(heard.append)
    calls = []

    def fails(x):
        calls.append(x)
        if len(calls) > 2:
            raise KeyError("mine")
        return module(x).square().mean()

    with pytest.raises(KeyError, match="mine"):
        vb.loss(fails, X, module=module, microbatch_size=2)
    assert not heard
    module(X).mean().backward()
    assert len(heard) == 1


def test_no_gradient_of_float16_underflows_inside():
    module = nn.Linear(3, 1, bias=False)
    rows = X.float() + 2

    def tiny(x):
        # The gradient that passes the cast is 5e-10, which is 0 in float16.
        return module(x).half().float().mean() * 1e-9

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    loss = vb.loss(tiny, rows, module=module, microbatch_size=2, scaler=scaler)
    scaler.scale(loss).backward()
    due = 2.0**20 * 1e-9 * rows.mean(0)
    torch.testing.assert_close(module.weight.grad[0], due, rtol=1e-3, atol=0)
    module.zero_grad()
    scaler.scale(vb.loss(tiny, rows, module=module, microbatch_size=2)).backward()
    assert not module.weight.grad.any()


def test_a_scaler_and_its_optimizer_do_as_with_the_whole_batch():
    module, plain = network(torch.float32), network(torch.float32)
    rows = X.float()
    for net, cut in ((module, True), (plain, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, growth_interval=1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scales = []
        for factor in (1.0, 1e38, 1.0):
            optimizer.zero_grad()
            fn = mean_square(net)

            def scaled(x, fn=fn, factor=factor):
                return fn(x) * factor

            if cut:
                loss = vb.loss(scaled, rows, module=net, microbatch_size=3, scaler=scaler)
            else:
                loss = scaled(rows)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        # The second step is infinite, and skipped.
        assert scales == [2.0**61, 2.0**60, 2.0**61]
    for a, b in zip(module.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_half_precision_is_rounded_once():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    rows = torch.ones(512, 1, dtype=torch.bfloat16)
    loss = vb.loss(lambda x: module(x).mean(), rows, module=module, microbatch_size=1)
    (loss * 3).backward()
    assert module.weight.grad.dtype == torch.bfloat16
    assert module.weight.grad.item() == 3.0


def test_sparse_gradients():
    table = nn.Embedding(6, 2, sparse=True).double()
    rows = torch.tensor([[0, 1], [1, 1], [5, 0]])
    loss = vb.loss(lambda x: table(x).square().mean(), rows, module=table, microbatch_size=2)
    (2 * loss).backward()
    found = table.weight.grad.to_dense()
    table.zero_grad()
    (2 * table(rows).square().mean()).backward()
    torch.testing.assert_close(found, table.weight.grad.to_dense(), rtol=1e-12, atol=0)


def test_aux_and_statistics():
    module = network()

    def with_aux(x):
        found = module(x)
        return found.square().mean(), found

    loss, aux, stats = vb.loss(
        with_aux, X, module=module, microbatch_size=3, has_aux=True, stats=True
    )
    loss.backward()
    torch.testing.assert_close(aux, module(X).detach(), rtol=1e-12, atol=0)
    square = sum(parameter.grad.square().sum() for parameter in module.parameters())
    torch.testing.assert_close(stats.square, square, rtol=1e-12, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_is_the_mean_loss(context):
    module = network()
    sizes = []

    def masked(batch):
        sizes.append(len(batch["x"]))
        errors = module(batch["x"])[:, 0].square()
        return (errors * batch["mask"]).sum() / batch["mask"].sum(), errors

    batch = {"x": X, "mask": torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0]).double()}
    with context():
        loss, errors = vb.loss(
            masked,
            batch,
            module=module,
            microbatch_size=3,
            weight=lambda batch: batch["mask"].sum(),
            has_aux=True,
            check=False,
        )
    assert sizes == [3, 3, 2]
    assert not loss.requires_grad
    due, due_errors = masked(batch)
    torch.testing.assert_close(loss, due.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(errors, due_errors.detach(), rtol=1e-12, atol=0)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_frozen_module_is_evaluated_and_not_trained():
    module = network().requires_grad_(False)
    with torch.no_grad():
        torch.testing.assert_close(ours(module), mean_square(module)(X), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        ours(module)


def test_evaluation_runs_again_where_memory_runs_out():
    module = network()
    sizes = []

    def hungry(x):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return module(x).square().mean()

    with torch.no_grad():
        found = vb.loss(hungry, X, module=module, microbatch_size=8, check=False)
        torch.testing.assert_close(found, mean_square(module)(X), rtol=1e-12, atol=0)
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_a_leaf_in_no_module_is_refused():
    module, leaf = network(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="module must hold every tensor that takes a gradient"):
        vb.loss(lambda x: module(x * leaf).mean(), X, module=module, microbatch_size=3)
    assert leaf.grad is None


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"scaler": 2.0}, TypeError, r"scaler must be a torch\.amp\.GradScaler\. Got float\."),
        (
            {"reduce": "window"},
            ValueError,
            r"reduce is for modules that add .* Got reduce='window' and no",
        ),
        (
            {"group": object()},
            ValueError,
            r"must be the wrapper that adds up .* Got Sequential in group",
        ),
    ],
)
def test_what_is_refused(options, error, text):
    module = network()
    calls = []
    with pytest.raises(error, match=text):
        vb.loss(calls.append, X, module=module, microbatch_size=3, **options)
    assert not calls


def test_statistics_need_gradients():
    module = network()
    with torch.no_grad(), pytest.raises(ValueError, match="needs gradients, whose noise"):
        ours(module, stats=True)


@pytest.mark.proves_itself
def test_a_wrong_weight_is_refused_also_in_evaluation():
    module = network()
    batch = {"x": X, "mask": torch.tensor([1.0, 1, 0, 1, 0, 1, 1, 0]).double()}

    def masked(batch):
        return (module(batch["x"])[:, 0] * batch["mask"]).sum() / batch["mask"].sum()

    with torch.no_grad(), pytest.raises(ValueError, match=r"weight=lambda batch: batch\['mask'\]"):
        vb.loss(masked, batch, module=module, microbatch_size=2)
    assert all(parameter.grad is None for parameter in module.parameters())
