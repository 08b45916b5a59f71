"""The first window of a loss proves itself on each rank that has rows, and no rank waits for it."""

import pytest
from tests.oracle import assert_all_close
from tests.torch import ranks
from tests.torch.replicated import VERBS, gradients, mse_of, network, rows, terms_of, uncut, weight
from torch.nn.parallel import DistributedDataParallel

pytestmark = pytest.mark.proves_itself


def proves(rank, world, verb, cuts):
    inner = network()
    net = DistributedDataParallel(inner)
    terms = terms_of(net, inner)
    calls = []

    def loss_fn(batch):
        calls.append(1)
        return terms(batch)

    options = {"module": net, "microbatch_size": 4, "weight": weight}
    found = []
    for _ in range(2):
        net.zero_grad()
        calls.clear()
        VERBS[verb](loss_fn, rows(*cuts[rank]), **options)
        found.append((gradients(inner), len(calls)))
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_lawful_is_run_a_few_times_more_once(verb):
    _, due = uncut(network(), lambda net: terms_of(net, net))
    without, with_rows = ranks.run(proves, 2, verb, [(0, 0), (0, 24)])
    for found, _ in (*without, *with_rows):
        assert_all_close(found, due)
    assert [calls for _, calls in without] == [0, 0]
    (_, first), (_, second) = with_rows
    assert first > second == 6


def breaks_the_law(rank, world):
    net = DistributedDataParallel(network())
    batch = rows(*[(0, 3), (3, 24)][rank])

    def loss_fn(batch):
        # Rank 0 has the honest loss, so that only the other can tell.
        if rank == 0:
            return mse_of(net)(batch)
        return (net(batch["x"]).square() * batch["a"]).sum() / batch["a"].sum().clamp(min=1)

    try:
        VERBS["backward"](loss_fn, batch, module=net, microbatch_size=4)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", gradients(net.module)
    return "nothing", gradients(net.module)


def test_what_breaks_the_law_on_one_rank_is_refused_on_all():
    (first, untouched), (second, untouched_too) = ranks.run(breaks_the_law, 2)
    assert first.startswith("RuntimeError: Another rank failed in this window.")
    assert second.startswith("ValueError: ")
    assert "weight" in second
    assert untouched == untouched_too == [None] * 4
