"""The PyTorch engine on a CUDA device."""

import gc
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import virtualbatch.torch as vb

if not torch.cuda.is_available():
    pytest.skip("PyTorch sees no CUDA device", allow_module_level=True)

ROWS = 50
MIB = 2**20


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def network(dtype=torch.float64, batchnorm=True):
    layers = [nn.Conv2d(1, 4, 3, padding=1)]
    layers += [nn.BatchNorm2d(4)] if batchnorm else []
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 3)).to("cuda", dtype)


def batch(rows=ROWS, dtype=torch.float64, device="cuda"):
    x = torch.randn(rows, 1, 8, 8, dtype=dtype)
    y, mask = torch.randint(0, 3, (rows,)), (torch.rand(rows) < 0.7).to(dtype)
    return x.to(device), y.to(device), mask.to(device)


def masked(model):
    def loss_fn(batch):
        x, y, mask = batch
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        return (losses * mask).sum() / mask.sum()

    return loss_fn


def mask_of(batch):
    return batch[2].sum()


def gradients(model):
    return [parameter.grad.clone() for parameter in model.parameters()]


def uncut(model, given):
    model.zero_grad()
    loss = masked(model)(given)
    loss.backward()
    found = [loss.detach(), *gradients(model)]
    model.zero_grad()
    return found


def assert_close(found, due, tolerance):
    for a, b in zip(found, due, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1, b.abs().max())


@pytest.mark.parametrize("size", [1, 7, 16, 50])
def test_the_gradient_is_that_of_the_uncut_batch(size):
    model, given = network(batchnorm=False), batch()
    due = uncut(model, given)
    loss = vb.backward(masked(model), given, module=model, microbatch_size=size, weight=mask_of)
    assert loss.device.type == "cuda"
    assert_close([loss, *gradients(model)], due, 1e-12)


def test_statistics_of_batchnorm_are_those_of_the_uncut_batch():
    model, other, given = network(), network(), batch()
    other.load_state_dict(model.state_dict())
    other(given[0])
    vb.backward(masked(model), given, module=model, microbatch_size=8, weight=mask_of)
    # The layer is the second: what it normalises does not depend on the cut.
    assert_close(model[1].buffers(), other[1].buffers(), 1e-12)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_batch_on_the_host_is_copied_a_micro_batch_at_a_time(pinned):
    model = network(batchnorm=False)
    host = batch(device="cpu")
    due = uncut(model, [leaf.cuda() for leaf in host])
    given = [leaf.pin_memory() for leaf in host] if pinned else host
    loss = vb.backward(
        lambda b: masked(model)(b), given, module=model, microbatch_size=8, weight=mask_of
    )
    assert_close([loss, *gradients(model)], due, 1e-12)


@contextmanager
def noted_waits():
    """Yields a list: at the end, a text for each time that the host waited for the device."""
    waits = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    texts = [str(warning.message) for warning in caught]
    waits += [text for text in texts if "called a synchronizing" in text]


def test_a_wait_is_noted():
    with noted_waits() as found:
        torch.ones(1, device="cuda").item()
    assert found


def waits(size, host=False, **options):
    """How often the host waits for the device in one window."""
    model = network(torch.float32, batchnorm=options.pop("batchnorm", False))
    given = batch(64, torch.float32, "cpu" if host else "cuda")
    given = [leaf.pin_memory() for leaf in given] if host else given
    weight = options.pop("weight", mask_of)
    for _ in range(2):
        with noted_waits() as found:
            vb.backward(
                masked(model), given, module=model, microbatch_size=size, weight=weight, **options
            )
    return len(found)


@pytest.mark.parametrize(
    "options", [{}, {"batchnorm": True}, {"stats": True}, {"host": True}], ids=str
)
def test_the_host_does_not_wait_for_micro_batches(options):
    # The weights are read, all at once.
    assert waits(2, **options) == waits(32, **options) <= 1
    assert waits(2, **{**options, "weight": None}) == 0


def test_half_precision_accumulates_in_float32():
    model = nn.Linear(1, 1, bias=False).to("cuda", torch.bfloat16)
    rows = torch.ones(1024, 1, device="cuda", dtype=torch.bfloat16)
    vb.backward(lambda x: model(x).mean(), rows, module=model, microbatch_size=1)
    assert model.weight.grad.item() == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype):
    model, given = network(torch.float32, batchnorm=False), batch(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    due = uncut(model, given)
    with torch.autocast("cuda", dtype):
        vb.backward(
            masked(model),
            given,
            module=model,
            microbatch_size=8,
            weight=mask_of,
            backward_fn=lambda loss: scaler.scale(loss).backward(),
        )
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler.unscale_(optimizer)
    # Eight bits of bfloat16.
    assert_close(gradients(model), due[1:], 2.0**-6)


def test_memory_does_not_grow_with_the_micro_batches():
    model = network(torch.float32, batchnorm=False)
    peaks = []
    for steps in (2, 16, 64):
        given = batch(32 * steps, torch.float32)
        for _ in range(2):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            vb.backward(masked(model), given, module=model, microbatch_size=32, weight=mask_of)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del before
    assert max(peaks[1::2]) <= 1.02 * min(peaks[1::2]), peaks


def wide():
    model = nn.Sequential(nn.Linear(64, 16384), nn.ReLU(), nn.Linear(16384, 8)).cuda()
    return model, torch.randn(1024, 64, device="cuda")


@pytest.mark.parametrize("size", [32, 256, 1024])
def test_a_planned_peak_is_what_the_device_holds(size):
    model, x = wide()

    def loss_fn(x):
        return model(x).square().mean()

    # Kernels take their workspaces once.
    vb.backward(loss_fn, x, module=model, microbatch_size=32)
    model.zero_grad()
    held = sum(t.nbytes for t in (x, *model.parameters()))
    others = torch.cuda.memory_allocated() - held
    plan = vb.plan(loss_fn, x, module=model)
    found = {row.microbatch_size: row.peak_bytes for row in plan.rows}
    assert {32, 1024} <= set(found)
    predicted = found[32] + (found[1024] - found[32]) / (1024 - 32) * (size - 32)
    torch.cuda.reset_peak_memory_stats()
    vb.backward(loss_fn, x, module=model, microbatch_size=size)
    peak = torch.cuda.max_memory_allocated() - others
    assert abs(predicted / peak - 1) < 0.10, (predicted / MIB, peak / MIB)


def limit(room):
    """Leaves the process some bytes beside what it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + room) / total)


def test_a_window_that_runs_out_of_memory_is_run_in_smaller_micro_batches():
    model, x = wide()

    def run(size):
        model.zero_grad()
        torch.manual_seed(1)
        loss = vb.backward(
            lambda x: nn.functional.dropout(model(x)).square().mean(),
            x,
            module=model,
            microbatch_size=size,
        )
        return [loss, *gradients(model)]

    run(16)
    # A micro-batch of 1,024 rows holds two activations of 64 MiB, and their gradient.
    limit(80 * MIB)
    found = run(1024)
    assert any(all(map(torch.equal, found, run(size))) for size in (512, 256, 128, 64, 32))


def test_automatic_sizes_stay_within_the_limit():
    model, x = wide()
    limit(80 * MIB)
    due = uncut_mean(model, x)
    model.zero_grad()
    vb.backward(lambda x: model(x).square().mean(), x, module=model, microbatch_size="auto")
    assert_close(gradients(model), due, 1e-5)


def uncut_mean(model, x):
    model.zero_grad()
    for piece in x.split(64):
        (model(piece).square().mean() / 16).backward()
    return gradients(model)


def test_too_little_for_one_row_is_told_and_changes_nothing():
    model = nn.Linear(8, 8).cuda()
    x = torch.randn(4, 8, device="cuda")
    limit(32 * MIB)

    def loss_fn(x):
        return (model(x).sum() * torch.ones(2**25, device="cuda")).mean()

    with pytest.raises(MemoryError, match="one row"):
        vb.backward(loss_fn, x, module=model, microbatch_size=4)
    assert all(parameter.grad is None for parameter in model.parameters())


class Two(nn.Module):
    """Has a parameter that no loss reaches."""

    def __init__(self, dropout):
        super().__init__()
        self.inner, self.unused = network(batchnorm=False), nn.Linear(2, 2).cuda()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.inner(x))


def replays(loss_fn):
    """How many graphs a captured loss function has, and replays of them counted from now on."""
    graphs = [graph for graph in loss_fn._graphs.values() if graph is not None]
    counts = []
    for graph in graphs:
        replay = graph.replay
        graph.replay = lambda *given, replay=replay: (counts.append(1), replay(*given))
    return len(graphs), counts


@pytest.mark.parametrize("host", [False, True], ids=["device", "pinned"])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_captured_graphs_give_the_gradient_of_the_uncut_batch(size, host):
    model = Two(0.0)
    loss_fn = vb.captured(masked(model))
    counts, expected = [], 0
    for window in range(5):
        given = batch()
        if window >= 3:
            # Those without any token are left out.
            expected += sum(bool(x.any()) for x in given[2].tensor_split(-(-50 // size)))
        due = uncut(model.inner, given)
        cut = [leaf.cpu().pin_memory() for leaf in given] if host else given
        if window == 3:
            graphs, counts = replays(loss_fn)
            assert graphs == len(
                {len(piece) for piece in torch.arange(50).tensor_split(-(-50 // size))}
            )
        loss = vb.backward(loss_fn, cut, module=model, microbatch_size=size, weight=mask_of)
        assert_close([loss, *gradients(model.inner)], due, 1e-12)
        assert loss.dtype == torch.float64
        assert model.unused.weight.grad is None
        with torch.no_grad():
            for parameter in model.inner.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    assert len(counts) == expected


def test_captured_gradients_are_added_and_stay():
    model = Two(0.0)
    loss_fn, given = vb.captured(masked(model)), batch()

    def run():
        vb.backward(loss_fn, given, module=model, microbatch_size=10, weight=mask_of)

    run()
    once = gradients(model.inner)
    kept = [parameter.grad for parameter in model.inner.parameters()]
    for times in (2, 3, 4):
        run()
        assert_close(gradients(model.inner), [times * x for x in once], 1e-12)
    model.zero_grad()
    run()
    # What was taken from `.grad` is not written again.
    assert_close(kept, [4 * x for x in once], 1e-12)


def test_captured_terms_have_their_own_weights():
    model = Two(0.0)

    def losses(batch):
        x, y, mask = batch
        found = nn.functional.cross_entropy(model(x), y, reduction="none")
        square = sum((p**2).sum() for p in model.inner.parameters())
        return {"rows": found.mean(), "tokens": (found * mask).sum() / mask.sum(), "square": square}

    def weights(batch):
        return {"rows": len(batch[0]), "tokens": mask_of(batch), "square": None}

    loss_fn = vb.captured(losses)
    for _ in range(3):
        given = batch()
        due_loss = sum(losses(given).values())
        due = torch.autograd.grad(due_loss, list(model.inner.parameters()))
        # A graph of the same parameters that is alive keeps them on its stream.
        due_loss = due_loss.detach()
        loss = vb.backward(loss_fn, given, module=model, microbatch_size=9, weight=weights)
        assert_close([loss, *gradients(model.inner)], [due_loss, *due], 1e-12)
        model.zero_grad()
    assert replays(loss_fn)[0] == 2


def test_captured_dropout_is_drawn_anew():
    model = Two(0.5)
    loss_fn = vb.captured(lambda x: model(x).square().mean())
    # The same rows in every micro-batch.
    x = torch.ones(8, 1, 8, 8, dtype=torch.float64, device="cuda")
    seen = []
    for _ in range(6):
        vb.backward(loss_fn, x, module=model, microbatch_size=1)
        seen.append(model.inner[0].weight.grad.clone())
        model.zero_grad()
    assert replays(loss_fn)[0] == 1
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 6
    # Half of 24 outputs are dropped; drawn once for all 8 rows, the spread would be larger.
    model.eval()
    for _ in range(3):
        vb.backward(loss_fn, x, module=model, microbatch_size=1)
        found = gradients(model.inner)
        model.zero_grad()
    due = torch.autograd.grad(model(x).square().mean(), list(model.inner.parameters()))
    assert_close(found, due, 1e-12)


def test_parameters_that_move_are_captured_anew():
    model = Two(0.0)
    loss_fn, given = vb.captured(masked(model)), batch()
    for window in range(9):
        if window % 3 == 0:
            for parameter in model.inner.parameters():
                parameter.data = torch.randn_like(parameter) / 4
        due = uncut(model.inner, given)
        loss = vb.backward(loss_fn, given, module=model, microbatch_size=10, weight=mask_of)
        assert_close([loss, *gradients(model.inner)], due, 1e-12)
        model.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_captured_autocast(dtype):
    model = network(torch.float32, batchnorm=False)
    loss_fn, given = vb.captured(masked(model)), batch(dtype=torch.float32)
    for _ in range(4):
        found = []
        for loss in (loss_fn, masked(model)):
            model.zero_grad()
            with torch.autocast("cuda", dtype):
                vb.backward(loss, given, module=model, microbatch_size=10, weight=mask_of)
            found.append(gradients(model))
        assert_close(*found, 1e-6)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    assert replays(loss_fn)[0] == 1


def reading(model):
    def loss_fn(x):
        # Whether a value is large can only be known on the host.
        return model(x).square().mean() * (1 if x.sum().item() < 1e9 else 2)

    return loss_fn


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_what_cannot_be_captured_runs_as_ever(dropout, caplog):
    model = Two(dropout)
    loss_fn, x = vb.captured(reading(model)), batch()[0]
    for seed in range(4):
        found = []
        for loss in (loss_fn, reading(model)):
            torch.manual_seed(seed)
            model.zero_grad()
            vb.backward(loss, x, module=model, microbatch_size=10)
            found.append(gradients(model.inner))
        assert all(map(torch.equal, *found))
    assert caplog.text.count("not captured") == 1


def test_parameters_of_a_living_graph_are_not_captured(caplog):
    model, given = network(batchnorm=False), batch()
    loss_fn, due = vb.captured(masked(model)), uncut(model, given)
    for _ in range(3):
        living = masked(model)(given)
        loss = vb.backward(loss_fn, given, module=model, microbatch_size=8, weight=mask_of)
        assert_close([loss, *gradients(model)], due, 1e-12)
        model.zero_grad()
    assert caplog.text.count("not captured") <= 1
    del living


@pytest.mark.parametrize("options", [{"stats": True}, {"batchnorm": True}], ids=str)
def test_windows_that_are_not_captured_say_so(options, caplog):
    model = network(batchnorm=options.pop("batchnorm", False))
    loss_fn, given = vb.captured(masked(model)), batch()
    for _ in range(3):
        model.zero_grad()
        vb.backward(loss_fn, given, module=model, microbatch_size=8, weight=mask_of, **options)
    assert caplog.text.count("not captured") == 1


def test_the_host_does_not_wait_for_captured_micro_batches():
    model, given = network(torch.float32, batchnorm=False), batch(64, torch.float32)
    loss_fn = vb.captured(masked(model))
    for _ in range(3):
        vb.backward(loss_fn, given, module=model, microbatch_size=2)
    with noted_waits() as found:
        vb.backward(loss_fn, given, module=model, microbatch_size=2)
    assert not found


def test_a_dropped_loss_function_drops_its_graphs():
    model, given = network(torch.float32, batchnorm=False), batch(64, torch.float32)
    held = []
    for _ in range(12):
        loss_fn = vb.captured(masked(model))
        for _ in range(3):
            vb.backward(loss_fn, given, module=model, microbatch_size=2, weight=mask_of)
            model.zero_grad()
        assert None not in loss_fn._graphs.values()
        del loss_fn
        gc.collect()
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved())
    assert held[-1] <= held[5], held


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_certificate_of_a_model_on_the_device(dropout):
    model = nn.Sequential(network(torch.float32, batchnorm=False), nn.Dropout(dropout))
    given = batch(dtype=torch.float32)
    right = vb.certify(masked(model), given, module=model, microbatch_size=8, weight=mask_of)
    assert right.exact, right
    wrong = vb.certify(masked(model), given, module=model, microbatch_size=8)
    assert [finding.kind for finding in wrong.findings] == ["weight"]
