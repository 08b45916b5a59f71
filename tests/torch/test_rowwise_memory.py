"""`rowwise` where memory is short: what stays flat, and what happens when memory runs out."""

import gc
import weakref

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.coupled import contrastive, in_one_graph, network, rows, taken, uncut
from torch import nn
from torch.nn import functional as F

import virtualbatch.torch as vb
from virtualbatch.torch._plan.peak import peak_bytes

ROWS, LARGE = 16, 3


class Limited:
    """A function for which more than some rows do not fit, from one of its calls on."""

    def __init__(self, module, fitting=0):
        self.module, self.fitting, self.sizes = module, fitting, []

    def __call__(self, x):
        self.sizes.append(len(x))
        if len(x) > LARGE and len(self.sizes) > self.fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.module(x)


def encoder(fn, module, size=8):
    return vb.rowwise(fn, module=module, microbatch_size=size)


def test_the_first_pass_starts_again_with_half_the_rows_which_are_kept():
    module, x = network(nn.BatchNorm1d(8), nn.Dropout(0.3)), rows(ROWS)
    torch.manual_seed(1)
    due = in_one_graph(module, x, 8)[1]
    other = in_one_graph(module, x, 1)[2]
    torch.manual_seed(1)
    fn = Limited(module, fitting=1)
    contrastive(encoder(fn, module)(x)).backward()
    assert fn.sizes == [8, 8, 4] + [2] * 16
    assert_all_close(taken(module), due)
    assert_close(module[1].running_var.numpy(), other[1].running_var.numpy())
    encoder(fn, module)(x)
    assert fn.sizes[-8:] == [2] * 8


def test_the_whole_batch_in_one_piece_is_cut_as_well():
    module, x = network(), rows(ROWS)
    due = uncut(module, x)
    contrastive(encoder(Limited(module), module, ROWS)(x)).backward()
    assert_all_close(taken(module), due)


def test_a_second_pass_without_randomness_is_cut_smaller():
    module, x = network(), rows(ROWS)
    due = uncut(module, x)
    fn = Limited(module, fitting=2)
    contrastive(encoder(fn, module)(x)).backward()
    assert fn.sizes == [8, 8, 8, 4] + [2] * 8
    assert_all_close(taken(module), due)


@pytest.mark.parametrize("layer", [nn.Dropout(0.3), nn.BatchNorm1d(8)])
def test_a_second_pass_that_belongs_to_its_micro_batches_names_a_size(layer):
    module = network(layer)
    z = encoder(Limited(module, fitting=2), module)(rows(ROWS))
    before = torch.get_rng_state()
    with pytest.raises(MemoryError, match=r"micro-batches of 8 rows\. Pass microbatch_size=4"):
        z.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert taken(module)[0] is None


@pytest.mark.parametrize("verb", [vb.backward, vb.loss])
@pytest.mark.parametrize("where", ["loss", "second pass", "one row"])
def test_a_window_with_a_rowwise_function_is_never_cut_smaller(verb, where):
    module = network(nn.Dropout(0.3))
    fn = Limited(module, fitting={"loss": 99, "second pass": 2, "one row": 0}[where])
    encode = encoder(fn, module, 1 if where == "one row" else 8)
    sizes = []

    def loss_fn(x):
        sizes.append(len(x))
        z = encode(x)
        if where == "loss" or (where == "one row"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return contrastive(z)

    match = r"Pass microbatch_size=4" if where == "second pass" else "sees all rows.*cannot be cut"
    with pytest.raises(MemoryError, match=match):
        verb(loss_fn, rows(ROWS), module=module, microbatch_size=ROWS, check=False)
    assert sizes == [ROWS]
    assert taken(module)[0] is None


def test_a_failed_function_of_one_row_keeps_its_error_inside_a_window():
    module = network()
    fn = Limited(module)
    encode = vb.rowwise(lambda x: fn(x.repeat(4, 1))[: len(x)], module=module, microbatch_size=2)
    with pytest.raises(MemoryError, match="A micro-batch of one row must fit"):
        vb.backward(lambda x: contrastive(encode(x)), rows(4), module=module, microbatch_size=4)
    assert fn.sizes == [8, 4]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 2)

    def forward(self, x):
        return self.head(self.layers(x[:, None].expand(-1, 32, -1))).mean(1)


def in_blocks(z):
    z = F.normalize(z, dim=1)

    def of_rows(batch, others):
        return F.cross_entropy(batch[0] @ others.T, batch[1], reduction="none")

    blocks = vb.rowwise(of_rows, microbatch_size=32)
    return blocks((z, torch.arange(len(z))), z.roll(1, 0)).mean()


def test_the_peak_is_that_of_a_micro_batch():
    torch.manual_seed(0)
    module = Wide()
    encode = vb.rowwise(module, microbatch_size=8)

    def peak(count):
        x = torch.randn(8 * count, 6)
        module.zero_grad()
        # Outputs, what the loss makes of them, and the gradients of both: two numbers of 4 bytes.
        of_outputs = 8 * count * 4 * 2 * 4
        return peak_bytes(lambda: in_blocks(encode(x)).backward()) - of_outputs

    few, some, many = peak(2), peak(4), peak(32)
    assert few == pytest.approx(some, rel=0.02)
    assert many == pytest.approx(some, rel=0.02)


def test_nothing_keeps_a_result_alive():
    module, graphs = network(), []

    def fn(x):
        assert all(graph() is None for graph in graphs)
        z = module(x)
        graphs.append(weakref.ref(z))
        return z

    gc.collect()
    gc.disable()
    try:
        z = vb.rowwise(fn, module=module, microbatch_size=4)(rows(ROWS))
        node = weakref.ref(z.grad_fn)
        contrastive(z).backward()
        del z
        assert node() is None
        assert len(graphs) == 8
    finally:
        gc.enable()
