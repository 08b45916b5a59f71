"""What `rowwise` refuses, and how it proves, certifies and plans what it wraps."""

import logging

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.coupled import ROWS, contrastive, in_one_graph, network, rows, taken
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import virtualbatch.torch as vb

MODULE = network()


def joined(x):
    return torch.cat([MODULE(x), MODULE(x)])


def changing(calls):
    def fn(x):
        calls.append(x)
        return {"z": MODULE(x)} if len(calls) == 1 else (MODULE(x),)

    return fn


OUTPUTS = {
    "mean": (
        lambda x: {"mean": MODULE(x).mean(0)},
        r"one entry per row\. Got output\['mean'\] with shape \(4,\) for 5 rows",
    ),
    "number": (lambda x: MODULE(x).sum(), r"Got output with shape \(\) for 5 rows"),
    "views joined": (joined, r"Got output with shape \(10, 4\) for 5 rows\. Return the 2 views"),
    "mean as long as views": (
        lambda x: x.new_ones(10),
        r"shape \(10,\) for 5 rows\. Return one entry per row, and reduce over rows in the loss",
    ),
    "other structure": (changing([]), r"same structure .* Got output\['z'\] .*, and later outp"),
    "other width": (
        lambda x: x[:, : len(x)],
        r"Got output float64\[5\], and later output float64\[4\]",
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_that_have_not_one_entry_per_row(name):
    fn, match = OUTPUTS[name]
    with pytest.raises(ValueError, match=match):
        vb.rowwise(fn, module=MODULE, accumulation_steps=3)(rows())
    assert taken(MODULE) == [None] * 4


@pytest.mark.parametrize("output", [1.0, "text"])
def test_outputs_that_are_no_tensors(output):
    with pytest.raises(TypeError, match=r"Got output\[1\] of type (float|str)"):
        vb.rowwise(lambda x: [x, output], accumulation_steps=3)(rows())


SOFT = torch.zeros(6, dtype=torch.float64, requires_grad=True)
OUTSIDE = MODULE[2].weight.exp().sum()
HELD = (
    r"module must hold every tensor that takes a gradient\. Got one of shape \({}\) .* that is in"
)
GRAPHS = {
    "leaf in no module": (lambda x: MODULE(x + SOFT), HELD.format("6,")),
    "parameter in no module": (network(), HELD.format(".*")),
    "graph from outside": (lambda x: MODULE(x) * OUTSIDE, r"Pass it as an argument: encode\(batc"),
    "reentrant checkpoint": (
        lambda x: checkpoint(MODULE, x.requires_grad_(), use_reentrant=True),
        "must be called with use_reentrant=False",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_comes_from_outside_is_refused_before_any_gradient(name):
    fn, match = GRAPHS[name]
    with pytest.raises(ValueError, match=match):
        vb.rowwise(lambda x: fn(x), module=MODULE, microbatch_size=4)(rows())
    assert taken(MODULE) == [None] * 4
    assert SOFT.grad is None


def test_arguments():
    with pytest.raises(TypeError, match="fn must be a function of a batch"):
        vb.rowwise(3, microbatch_size=2)
    with pytest.raises(ValueError, match="microbatch_size must be a positive integer"):
        vb.rowwise(MODULE, microbatch_size=0)
    with pytest.raises(ValueError, match="A batch needs a size"):
        vb.rowwise(MODULE)(rows())
    with pytest.raises(ValueError, match="A Window is already cut"):
        vb.rowwise(MODULE, microbatch_size=2)(vb.Window([rows(), rows()]))


def centred(x):
    z = MODULE(x)
    return z - z.mean(0)


def ranked(x):
    return {"z": MODULE(x), "rank": x[:, 0].argsort().argsort()}


COUPLED = {
    "centred": (centred, "coupled_rows at test_rowwise_checks.py"),
    "centred after dropout": (lambda x: centred(F.dropout(x, 0.3)), "coupled_rows at test_row"),
    "nothing is trained": (lambda x: x - x.mean(0), "values that change with the other rows"),
    "an integer": (ranked, r"values of output\['rank'\] that change"),
    "as many rows as numbers": (lambda x: MODULE(x).mean(0), r"with shape \(4,\) for 1 row"),
}


@pytest.mark.proves_itself
@pytest.mark.parametrize("name", COUPLED)
def test_the_first_call_finds_what_sees_other_rows(name):
    fn, match = COUPLED[name]
    with pytest.raises(ValueError, match=match):
        vb.rowwise(fn, module=MODULE, microbatch_size=4)(rows(12))
    assert taken(MODULE) == [None] * 4
    vb.rowwise(fn, module=MODULE, microbatch_size=4, check=False)(rows(12))


OWN = torch.Generator().manual_seed(0)


@pytest.mark.proves_itself
def test_the_first_call_finds_what_is_another_result_in_the_second_pass():
    def noisy(x):
        noise = torch.rand(len(x), 4, generator=OWN) if MODULE.training else 0
        return MODULE(x) + noise

    with pytest.raises(ValueError, match=r"calls its function twice, and .* of output from"):
        vb.rowwise(noisy, module=MODULE, microbatch_size=4)(rows())


@pytest.mark.proves_itself
def test_the_first_call_inside_a_window_leaves_its_statistics_alone():
    module, x = network(nn.BatchNorm1d(8)), rows()
    due = in_one_graph(module, x, 3)[1]
    running = in_one_graph(module, x, 1)[2][1].running_mean
    encode = vb.rowwise(module, accumulation_steps=3)
    vb.backward(lambda x: contrastive(encode(x)), x, module=module, microbatch_size=ROWS)
    assert_all_close(taken(module), due)
    assert_close(module[1].running_mean.numpy(), running.numpy())


@pytest.mark.proves_itself
def test_the_first_call_inside_a_checkpoint():
    module, x = network(nn.Dropout(0.3)), rows()
    torch.manual_seed(1)
    due = in_one_graph(module, x, 3)[1]
    torch.manual_seed(1)
    encode = vb.rowwise(module, accumulation_steps=3)
    contrastive(checkpoint(encode, x, use_reentrant=False)).backward()
    assert_all_close(taken(module), due)


RIGHT = {
    "dropout and BatchNorm": network(nn.Dropout(0.3), nn.BatchNorm1d(8)),
    "half precision": network().bfloat16(),
    "compiled": torch.compile(network(), backend="eager"),
    "frozen": network().requires_grad_(False),
    "functional dropout": lambda x: F.dropout(MODULE(x), 0.3),
}


@pytest.mark.proves_itself
@pytest.mark.parametrize("name", RIGHT)
def test_the_first_call_lets_through_what_is_row_by_row_and_leaves_no_trace(name, caplog):
    fn = RIGHT[name]
    module = fn if isinstance(fn, nn.Module) else MODULE
    x = rows().to(next(module.parameters()).dtype)
    found = {}
    for check in (False, True):
        torch.manual_seed(0)
        with torch.random.fork_rng(), _same_state(module):
            z = vb.rowwise(fn, module=module, microbatch_size=4, check=check)(x)
            found[check] = z.detach(), torch.rand(2), [b.clone() for b in module.buffers()]
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[True][1], found[False][1])
    assert all(map(torch.equal, found[True][2], found[False][2]))
    assert not [record for record in caplog.records if record.name == "virtualbatch"]


class _same_state:
    def __init__(self, module):
        self._module = module

    def __enter__(self):
        self._before = {name: x.clone() for name, x in self._module.state_dict().items()}

    def __exit__(self, *_):
        self._module.load_state_dict(self._before)


@pytest.mark.proves_itself
def test_a_function_is_tried_once_and_gradients_of_rows_stay_away():
    calls = []
    x = rows().requires_grad_()
    source = x * 2

    def encode(x, scale):
        calls.append(len(x))
        return MODULE(x) * scale

    function = vb.rowwise(encode, module=MODULE, microbatch_size=4)
    function(source, source.sum())
    tried = len(calls) - 4
    assert tried > 0
    function(source, source.sum())
    assert len(calls) == tried + 8
    assert x.grad is None


def test_certify_takes_a_rowwise_function():
    module, x = network(), rows()
    certificate = vb.certify(vb.rowwise(module, accumulation_steps=3), x, module=module)
    certificate.raise_if_inexact()
    assert set(certificate.parameters) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert taken(module) == [None] * 4
    function = vb.rowwise(centred, module=MODULE, microbatch_size=5)
    (finding,) = vb.certify(function, x, module=MODULE).findings
    assert finding.kind == "coupled_rows"
    assert finding.where.startswith("test_rowwise_checks.py")
    layers = network(nn.BatchNorm1d(8))
    (finding,) = vb.certify(vb.rowwise(layers), x, module=layers, microbatch_size=4).findings
    assert (finding.kind, finding.where.partition(" ")[0]) == ("batchnorm", "1")
    with pytest.raises(ValueError, match="weight and has_aux belong to a loss"):
        vb.certify(function, x, module=MODULE, weight="sum")


@pytest.mark.usefixtures("untimed_plans")
def test_sizes_are_planned(caplog):
    module, x = network(), rows(64).requires_grad_()
    function = vb.rowwise(lambda x, scale: module(x * scale), module=module, microbatch_size="auto")
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    with caplog.at_level(logging.INFO, "virtualbatch"):
        for _ in range(2):
            contrastive(function(x, scale * 1.5)).backward()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("microbatch_size=")
    due = [2 * g for g in _gradients(module, x, scale)]
    found = taken(module, x, scale)
    for a, b in zip(found, due, strict=True):
        assert abs(a - b).max() <= 1e-12 * abs(b).max()
    plans = [vb.plan(vb.rowwise(module), x.detach(), module=module)]
    limit = plans[0].rows[-1].peak_bytes - 1
    plans += [vb.plan(vb.rowwise(module), x.detach(), module=module, memory_limit=limit)]
    assert plans[1].microbatch_size < plans[0].microbatch_size


def _gradients(module, x, scale):
    leaves = [*module.parameters(), x, scale]
    loss = contrastive(module(x * (scale * 1.5)))
    return [g.numpy() for g in torch.autograd.grad(loss, leaves)]


@pytest.mark.usefixtures("untimed_plans")
def test_a_function_inside_a_window_is_planned_with_it():
    function = vb.rowwise(MODULE, microbatch_size=4)
    plan = vb.plan(lambda x: contrastive(function(x)), rows(), module=MODULE)
    assert plan.microbatch_size <= ROWS
    assert taken(MODULE) == [None] * 4


@pytest.mark.parametrize("size", [2, ROWS])
def test_a_function_that_leaves_recording_off_is_refused_in_one_micro_batch_too(size):
    def fn(x):
        found = MODULE(x)
        torch.set_grad_enabled(False)
        return found

    with pytest.raises(ValueError, match="must not leave gradient recording switched"):
        vb.rowwise(fn, module=MODULE, microbatch_size=size, check=False)(rows())
    assert torch.is_grad_enabled()
