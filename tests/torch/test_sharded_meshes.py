"""Meshes of fully sharded modules: over which ranks weights are summed, and where one must say."""

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases
from tests.torch.replicated import uncut
from tests.torch.sharded import full, full_gradients, mse_of, net, sharded, steps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

import virtualbatch.torch as vb

# What a layer of tensor parallelism gives is a view, which nothing here changes.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")

TWO, FOUR = Cases(2, limit=60), Cases(4, limit=60)
QUARTERS = [(0, 3), (3, 3), (3, 14), (14, 24)]


def of_replicas(rank, reduce):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    module = sharded(mesh=mesh)
    losses = [float(steps(module, *QUARTERS[rank], reduce=reduce)) for _ in range(2)]
    return losses, full_gradients(module)


HSDP = {
    reduce: FOUR.case(lambda rank, r=reduce: of_replicas(rank, r), f"replicas of shards, {reduce}")
    for reduce in ("microbatch", "window")
}


@pytest.mark.parametrize("reduce", HSDP)
def test_replicas_of_shards(reduce):
    loss, due = uncut(net(), mse_of)
    for losses, gradients in HSDP[reduce]():
        assert_close(losses, [loss, loss])
        assert_all_close(gradients, [2 * x for x in due])


@FOUR.case
def two_pairs(rank):
    """Two models apart, each on a mesh of two dimensions that has half of the ranks."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("apart", "replicate", "shard"))
    module = sharded(mesh=mesh["replicate", "shard"])
    for _ in range(1 if rank < 2 else 2):
        steps(module, *[(0, 9), (9, 24)][rank % 2])
    return full_gradients(module)


def test_a_mesh_of_some_ranks_sums_weights_over_these():
    _, due = uncut(net(), mse_of)
    for rank, gradients in enumerate(two_pairs()):
        assert_all_close(gradients, [(1 if rank < 2 else 2) * x for x in due])


class Tokens(nn.Module):
    """A network of an embedding, a wide layer and a head over 12 classes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(12, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 12)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(x + self.down(torch.tanh(self.up(x))))


def tokens(start=0, stop=24):
    made = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 12, (24, 5), generator=made)
    labels = torch.randint(0, 12, (24, 5), generator=made)
    labels[torch.rand(24, 5, generator=made) < 0.4] = -100
    return {"ids": ids[start:stop], "labels": labels[start:stop]}


def entropy_of(module):
    def entropy(batch):
        logits = module(batch["ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    return entropy


def parallel(mesh, by_class=False):
    """The network with its wide layer and its head cut over a mesh."""
    head = (
        ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        if by_class
        else ColwiseParallel(output_layouts=Replicate())
    )
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "head": head}
    return parallelize_module(Tokens().double(), mesh, plan)


def step(module, batch, **options):
    return vb.backward(
        entropy_of(module),
        batch,
        module=module,
        microbatch_size=4,
        weight=lambda given: (given["labels"] != -100).sum(),
        **options,
    )


def assert_uncut(losses_and_gradients):
    loss, due = uncut(Tokens().double(), entropy_of, tokens())
    for found, gradients in losses_and_gradients:
        assert_close(found, loss)
        assert_all_close(gradients, due)


@TWO.case
def tensor_parallel(rank):
    module = parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    loss = step(module, tokens())
    return float(full(loss)), full_gradients(module)


@TWO.case
def loss_by_class(rank):
    module = parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), by_class=True)
    with loss_parallel():
        loss = step(module, tokens())
    return float(full(loss)), full_gradients(module)


@pytest.mark.parametrize("case", [tensor_parallel, loss_by_class])
def test_tensor_parallelism_alone_needs_nothing(case):
    assert_uncut(case())


def two_dimensions(rank, embedding=True, by_class=False, **options):
    """Rows by `dp`, layers by `tp`; weights over all four ranks would give half the gradient."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = parallel(mesh["tp"], by_class)
    module.embedding.requires_grad_(embedding)
    for bias in (module.down.bias, module.head.bias):
        bias.requires_grad_(embedding)
    for layer in (module.up, module.down):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    if options:
        options = {"group": mesh[options["group"]]}
    batch = tokens(*[(0, 5), (5, 24)][mesh.get_local_rank("dp")])
    try:
        if by_class:
            with loss_parallel():
                loss = step(module, batch, **options)
        else:
            loss = step(module, batch, **options)
    except ValueError as error:
        return str(error), None
    return float(full(loss)), full_gradients(module)


@FOUR.case
def told_by_placements(rank):
    return two_dimensions(rank)


@FOUR.case
def with_loss_by_class(rank):
    return two_dimensions(rank, by_class=True)


@pytest.mark.parametrize("case", [told_by_placements, with_loss_by_class])
def test_weights_are_summed_over_the_ranks_that_hold_other_rows(case):
    assert_uncut(case())


@FOUR.case
def not_told(rank):
    """All that is trained is on both dimensions."""
    return two_dimensions(rank, embedding=False)


@FOUR.case
def given(rank):
    return two_dimensions(rank, embedding=False, group="dp")


@FOUR.case
def given_wrongly(rank):
    return two_dimensions(rank, group="tp")


def test_a_mesh_that_does_not_tell_needs_a_group():
    for error, _ in not_told():
        assert error == (
            "Weights are summed over the ranks that hold different rows. Got parameters on a mesh "
            "('dp', 'tp'), which does not show which ranks these are. Pass group=mesh[\"dp\"]."
        )


def test_a_group_that_is_given():
    module = Tokens().double()
    module.embedding.requires_grad_(False)
    for bias in (module.down.bias, module.head.bias):
        bias.requires_grad_(False)
    loss, due = uncut(module, entropy_of, tokens())
    for found, gradients in given():
        assert_close(found, loss)
        assert_all_close(gradients, due)


def test_another_group_than_that_of_the_module():
    error, _ = given_wrongly()[0]
    assert error == (
        "group must be the ranks over which the module adds up gradients. "
        "Got ranks [0, 1] for a module of ranks [0, 2]. Leave group out."
    )
