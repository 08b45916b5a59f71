"""The law over ranks: whatever rows each has, all get the gradient and loss of the uncut batch."""

import pytest
import torch
from tests.oracle import assert_all_close, assert_close
from tests.torch.ranks import Cases
from tests.torch.replicated import (
    VERBS,
    column,
    gradients,
    mse_of,
    network,
    rows,
    scalar,
    terms_of,
    uncut,
    weight,
)
from torch.nn.parallel import DistributedDataParallel

import virtualbatch.torch as vb

TWO, THREE = Cases(2), Cases(3)
X = [[1, 2, 3, 4], [5, 6, 7, 8]]
ONES = [[1] * 4, [1] * 4]
ALL = [1, 2, 3, 4, 5, 6, 7, 8]
# x and masks by rank, size of micro-batches, factor of w**2, gradient and loss at w = 1.
BY_HAND = {
    "rows 4 and 4": (X, ONES, 2, 0, 4.5, 4.5),
    "rows 1 and 7": ([[1], ALL[1:]], [[1], [1] * 7], 2, 0, 4.5, 4.5),
    "rows 0 and 8": ([[], ALL], [[], [1] * 8], 3, 0, 4.5, 4.5),
    "a token on one rank, four on the other": (X, [[1, 0, 0, 0], [1] * 4], 2, 0, 5.4, 5.4),
    "no token on one rank": (X, [[0] * 4, [1] * 4], 2, 0, 6.5, 6.5),
    "weights of another size on each": (X, [[0.5] * 4, [2] * 4], 2, 0, 5.7, 5.7),
    "a penalty counts once": (X, ONES, 1, 0.1, 4.7, 4.6),
    "a penalty counts once beside no rows": ([[], ALL], [[], [1] * 8], 8, 0.1, 4.7, 4.6),
}


def by_hand(rank, verb, xs, masks, size, factor):
    net = scalar()
    batch = {"x": column(xs[rank]), "mask": column(masks[rank])}

    def terms(batch):
        mean = (net(batch["x"]) * batch["mask"]).sum() / batch["mask"].sum()
        if not factor:
            return {"mean": mean}
        return {"mean": mean, "penalty": factor * net.module.weight.square().sum()}

    def weigh(batch):
        return {"mean": batch["mask"].sum(), **({"penalty": None} if factor else {})}

    loss = VERBS[verb](terms, batch, module=net, microbatch_size=size, weight=weigh)
    return float(net.module.weight.grad), float(loss)


FOUND = {
    (verb, name): TWO.case(lambda rank, v=verb, c=case: by_hand(rank, v, *c[:4]), f"{verb} {name}")
    for verb in VERBS
    for name, case in BY_HAND.items()
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("verb", VERBS)
def test_one_parameter_by_hand(verb, name):
    *_, gradient, loss = BY_HAND[name]
    for found in FOUND[verb, name]():
        assert_close(found, (gradient, loss))


@THREE.case
def three_ranks(rank):
    xs = [[1], [2, 3], [4, 5, 6, 7, 8]]
    return by_hand(rank, "backward", xs, [[1] * len(x) for x in xs], 2, 0)


def test_three_ranks_of_one_two_and_five_rows():
    for found in three_ranks():
        assert_close(found, (4.5, 4.5))


NOTHING = {
    verb: TWO.case(lambda rank, v=verb: by_hand(rank, v, X, [[0] * 4] * 2, 2, 0), f"{verb} nothing")
    for verb in VERBS
}


@pytest.mark.parametrize("verb", VERBS)
def test_no_token_anywhere_is_zero_and_not_none(verb):
    assert NOTHING[verb]() == [(0.0, 0.0)] * 2


@TWO.case
def nothing_beside_no_rows(rank):
    return by_hand(rank, "backward", [[], ALL], [[], [0] * 8], 2, 0)


def test_no_token_anywhere_where_one_rank_has_no_rows():
    assert nothing_beside_no_rows() == [(0.0, 0.0)] * 2


@TWO.case
def other_sizes(rank):
    net = scalar()
    loss = vb.backward(mean_of(net), column(X[rank]), module=net, microbatch_size=(1, 4)[rank])
    return float(net.module.weight.grad), float(loss)


def mean_of(net):
    return lambda x: net(x).mean()


def test_each_rank_may_have_a_size_of_its_own():
    for found in other_sizes():
        assert_close(found, (4.5, 4.5))


@TWO.case
def window_beside_batch(rank):
    net = scalar()
    if rank == 0:
        window = vb.Window([column([1]), column([2, 3]), column([4])])
        vb.backward(mean_of(net), window, module=net)
    else:
        vb.backward(mean_of(net), column(X[1]), module=net, microbatch_size=3)
    return float(net.module.weight.grad)


@TWO.case
def empty_window_beside_batch(rank):
    net = scalar()
    batch, size = (vb.Window([]), None) if rank == 0 else (column(ALL), 3)
    vb.backward(mean_of(net), batch, module=net, microbatch_size=size)
    return float(net.module.weight.grad)


def test_a_window_on_one_rank_and_a_batch_on_the_other():
    assert_close(window_beside_batch(), [4.5, 4.5])
    assert_close(empty_window_beside_batch(), [4.5, 4.5])


@TWO.case
def unknown_rows(rank):
    net = scalar()
    # Leaves that share no axis have no rows, so a term without weight counts by micro-batch.
    numbers = [[1.0, 2.0], [6.0]][rank]
    window = vb.Window([{"a": column([x]), "b": torch.ones(2)} for x in numbers])

    def terms(batch):
        return {"mean": net(batch["a"]).mean(), "penalty": 0.1 * net.module.weight.square().sum()}

    loss = vb.backward(terms, window, module=net, weight=lambda batch: {"mean": 1, "penalty": None})
    return float(net.module.weight.grad), float(loss)


def test_a_penalty_counts_once_where_rows_are_not_known():
    for found in unknown_rows():
        assert_close(found, (3.2, 3.1))


CUTS = {
    "12 and 12 by 4": ([(0, 12), (12, 24)], (4, 4)),
    "5 and 19 by 2": ([(0, 5), (5, 24)], (2, 2)),
    "0 and 24 by 4": ([(0, 0), (0, 24)], (4, 4)),
    "1 and 23 by 4": ([(0, 1), (1, 24)], (4, 4)),
    "12 by 1 and 12 by 6": ([(0, 12), (12, 24)], (1, 6)),
    "12 and 12 uncut": ([(0, 12), (12, 24)], (12, 12)),
    "3, 0 and 21 by 4": ([(0, 3), (3, 3), (3, 24)], (4, 4, 4)),
}


def three_terms(rank, verb, cuts, sizes):
    inner = network()
    net = DistributedDataParallel(inner)
    loss = VERBS[verb](
        terms_of(net, inner),
        rows(*cuts[rank]),
        module=net,
        microbatch_size=sizes[rank],
        weight=weight,
    )
    return loss.numpy().tobytes(), float(loss), gradients(inner)


TERMS = {
    (verb, name): (TWO, THREE)[len(case[0]) - 2].case(
        lambda rank, v=verb, c=case: three_terms(rank, v, *c), f"{verb} {name}"
    )
    for verb in VERBS
    for name, case in CUTS.items()
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("verb", VERBS)
def test_three_terms_that_are_means_over_different_things(verb, name):
    loss, due = uncut(network(), lambda net: terms_of(net, net))
    results = TERMS[verb, name]()
    for _, found, gradient in results:
        assert_close(found, loss)
        assert_all_close(gradient, due)
    assert len({as_bytes for as_bytes, _, _ in results}) == 1


@TWO.case
def kept_gradients(rank):
    inner = network()
    net = DistributedDataParallel(inner, gradient_as_bucket_view=True)
    batch = rows(12 * rank, 12 * rank + 12)
    options = {"module": net, "microbatch_size": 5}
    vb.backward(mse_of(net), batch, **options)
    first = [p.grad for p in inner.parameters()]
    places = [grad.data_ptr() for grad in first]
    vb.backward(mse_of(net), batch, **options)
    same = all(p.grad is grad for p, grad in zip(inner.parameters(), first, strict=True))
    twice = gradients(inner)
    loss = vb.loss(mse_of(net), batch, **options)
    loss.backward()
    return same, places == [p.grad.data_ptr() for p in inner.parameters()], twice, gradients(inner)


def test_kept_gradients_stay_where_they_are_and_are_added_to():
    _, due = uncut(network(), mse_of)
    for same_objects, same_memory, twice, thrice in kept_gradients():
        assert same_objects
        assert same_memory
        assert_all_close(twice, [2 * gradient for gradient in due])
        assert_all_close(thrice, [3 * gradient for gradient in due])


@TWO.case
def statistics(rank):
    inner = network()
    net = DistributedDataParallel(inner)
    cut = [(0, 8), (8, 24)][rank]
    _, stats = vb.backward(mse_of(net), rows(*cut), module=net, microbatch_size=4, stats=True)
    return stats.rows, stats.microbatches, float(stats.mean_square), float(stats.square)


def test_noise_statistics_are_those_of_all_ranks():
    inner = network()
    _, alone = vb.backward(mse_of(inner), rows(0, 24), module=inner, microbatch_size=4, stats=True)
    due = alone.rows, alone.microbatches, float(alone.mean_square), float(alone.square)
    for found in statistics():
        assert found[:2] == due[:2] == (24, 6)
        assert_close(found[2:], due[2:])
