"""Kinds of modules and windows over ranks that an implementation may easily forget."""

from functools import partial

import pytest
import torch
from tests.oracle import assert_all_close
from tests.torch.ranks import Cases
from tests.torch.replicated import VERBS, gradients, mse_of, network, rows, uncut, with_batchnorm
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import virtualbatch.torch as vb

TWO = Cases(2)
UNEVEN = [(0, 5), (5, 24)]


def pair():
    torch.manual_seed(4)
    return nn.Linear(6, 9).double(), nn.Linear(9, 6).double()


def two_modules(rank, verb, find):
    body, head = (
        DistributedDataParallel(module, bucket_cap_mb=0.0002, find_unused_parameters=find)
        for module in pair()
    )
    for _ in range(3):
        for module in (body, head):
            module.zero_grad()
        VERBS[verb](
            mse_of(lambda x: head(body(x).tanh())),
            rows(*UNEVEN[rank]),
            module=[head, body],
            microbatch_size=4,
        )
    return gradients(body.module) + gradients(head.module)


PAIRS = {
    (verb, find): TWO.case(partial(two_modules, verb=verb, find=find), f"pair {verb} {find}")
    for verb in VERBS
    for find in (False, True)
}


@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
@pytest.mark.parametrize(("verb", "find"), PAIRS)
def test_two_modules_are_reduced_in_the_same_order(verb, find):
    body, head = pair()
    uncut(nn.ModuleList([body, head]), lambda _: mse_of(lambda x: head(body(x).tanh())))
    for found in PAIRS[verb, find]():
        assert_all_close(found, gradients(body) + gradients(head))


class Words(nn.Module):
    """Sparse gradients; rows whose word is below 5 look it up in one table, others in another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.low = nn.Embedding(5, 3, sparse=True).double()
        self.high = nn.EmbeddingBag(10, 3, mode="sum", sparse=True).double()

    def forward(self, words):
        low = words < 5
        parts = [self.low(words[low])] if low.any() else []
        if (~low).any():
            parts.append(self.high(words[~low][:, None]))
        return torch.cat(parts)


WORDS = torch.tensor([0, 1, 1, 4, 2, 7, 9, 9, 3, 8])


def sparse(rank, verb, cuts):
    net = DistributedDataParallel(Words())
    VERBS[verb](
        lambda words: net(words).square().mean(),
        WORDS[slice(*cuts[rank])],
        module=net,
        microbatch_size=2,
    )
    return gradients(net.module), [p.grad.is_sparse for p in net.parameters()]


# One table is not used on rank 0; then neither is, for it has no rows.
SPARSE_CUTS = {"one table": [(0, 4), (4, 10)], "no table": [(0, 0), (0, 10)]}
SPARSE = {
    (verb, name): TWO.case(partial(sparse, verb=verb, cuts=cuts), f"{verb} {name}")
    for verb in VERBS
    for name, cuts in SPARSE_CUTS.items()
}


@pytest.mark.parametrize(("verb", "name"), SPARSE)
def test_a_sparse_table_that_one_rank_does_not_use(verb, name):
    module = Words()
    module(WORDS).square().mean().backward()
    for found, kinds in SPARSE[verb, name]():
        assert_all_close(found, gradients(module))
        assert kinds == [True, True]


@TWO.case
def frozen_first(rank):
    inner = network()
    inner[0].requires_grad_(False)
    net = DistributedDataParallel(inner)
    vb.backward(mse_of(net), rows(*UNEVEN[rank]), module=net, microbatch_size=4)
    return gradients(inner)


def test_frozen_before_it_is_wrapped():
    _, due = uncut(network(), mse_of)
    for found in frozen_first():
        assert_all_close(found, [None, None, *due[2:]])


@TWO.case
def frozen_later(rank):
    net = DistributedDataParallel(network())
    net.module[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"Got 2 trainable parameters, and 4 when it was made\."):
        vb.backward(mse_of(net), rows(0, 4), module=net, microbatch_size=2)
    inner = network()
    inner[0].requires_grad_(False)
    swapped = DistributedDataParallel(inner)
    for layer in inner[0], inner[2]:
        layer.requires_grad_(layer is inner[0])
    with pytest.raises(ValueError, match=r"must be made after parameters are frozen or unfrozen\."):
        vb.backward(mse_of(swapped), rows(0, 4), module=swapped, microbatch_size=2)
    return gradients(inner)


def test_frozen_or_swapped_after_it_was_wrapped_is_refused():
    assert frozen_later() == [[None] * 4] * 2


@TWO.case
def tied(rank):
    torch.manual_seed(6)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    inner[2].weight = inner[0].weight
    net = DistributedDataParallel(inner)
    vb.backward(mse_of(net), rows(*UNEVEN[rank]), module=net, microbatch_size=4)
    return gradients(inner)


def test_a_weight_in_two_places():
    torch.manual_seed(6)
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    inner[2].weight = inner[0].weight
    _, due = uncut(inner, mse_of)
    for found in tied():
        assert_all_close(found, due)


@TWO.case
def through_the_inside(rank):
    net = DistributedDataParallel(network())
    outer = nn.Sequential(net)
    vb.backward(mse_of(net.module), rows(*UNEVEN[rank]), module=outer, microbatch_size=4)
    return gradients(net.module)


def test_the_loss_may_call_what_is_inside_and_the_module_may_be_around():
    _, due = uncut(network(), mse_of)
    for found in through_the_inside():
        assert_all_close(found, due)


@TWO.case
def beside_stock_steps(rank):
    net = DistributedDataParallel(network(), bucket_cap_mb=0.0005)
    cut = [(0, 5), (5, 24)][rank]
    found = []
    for _ in range(2):
        net.zero_grad()
        mse_of(net)(rows(12 * rank, 12 * rank + 12)).backward()
        found.append(gradients(net.module))
        net.zero_grad()
        vb.backward(mse_of(net), rows(*cut), module=net, microbatch_size=4)
        found.append(gradients(net.module))
    return found


def test_steps_of_pytorch_and_windows_take_turns():
    _, due = uncut(network(), mse_of)
    for windows in beside_stock_steps():
        for found in windows:
            assert_all_close(found, due)


class Messages(TorchDispatchMode):
    """Hears collectives."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        if fn.namespace == "c10d":
            self.heard.append(str(fn))
        return fn(*args, **(kwargs or {}))


def counted(rank, verb, microbatches):
    net = DistributedDataParallel(with_batchnorm())
    reduced = []

    def hook(group, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        buffer = bucket.buffer().div_(2)
        work = distributed.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    net.register_comm_hook(None, hook)
    found = []
    for _ in range(2):
        reduced.clear()
        with Messages() as messages:
            window = vb.Window(
                [rows(0, 48 // microbatches) for _ in range(microbatches)] if rank == 0 else []
            )
            VERBS[verb](mse_of(net), window, module=net)
        found.append((list(reduced), len(messages.heard) - len(reduced)))
    return found


NUMBERS = [1, 2, 4, 8, 24]
COUNTED = {
    (verb, n): TWO.case(partial(counted, verb=verb, microbatches=n), f"{verb} {n} micro-batches")
    for verb in VERBS
    for n in NUMBERS
}


@pytest.mark.parametrize(("verb", "microbatches"), COUNTED)
def test_gradients_meet_once_however_many_micro_batches_there_are(verb, microbatches):
    size = sum(8 * parameter.numel() for parameter in with_batchnorm().parameters())
    for _, (reduced, messages) in COUNTED[verb, microbatches]():
        # The first window has the messages in which PyTorch chooses its buckets, too.
        assert reduced == [size]
        assert messages == 3
