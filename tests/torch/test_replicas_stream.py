"""Windows that several ranks read together: they end when all have ended, and no rank waits."""

import pytest
import torch
from tests.torch import ranks
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import virtualbatch.torch as vb

LENGTHS = (3, 5)


def read(rank, world, lengths, group=None):
    """What each epoch of two gives: the micro-batches of every window."""
    given = distributed.group.WORLD if group is None else group()
    stream = [f"{rank}.{k}" for k in range(lengths[rank])]
    found = vb.windows(stream, accumulation_steps=2, group=given)
    return [[list(window) for window in found] for _ in range(2)]


def test_windows_end_when_all_ranks_have_ended():
    first, second = ranks.run(read, 2, LENGTHS)
    # The second epoch reads the stream anew.
    assert first == 2 * [[["0.0", "0.1"], ["0.2"], []]]
    assert second == 2 * [[["1.0", "1.1"], ["1.2", "1.3"], ["1.4"]]]


def test_a_rank_may_have_no_micro_batch_at_all():
    assert ranks.run(read, 2, (0, 3))[0] == 2 * [[[], []]]


def test_a_mesh_of_two_dimensions_ends_when_its_last_rank_has():
    found = ranks.run(read, 4, (1, 0, 5, 2), lambda: init_device_mesh("cpu", (2, 2)))
    assert [len(epochs[0]) for epochs in found] == 4 * [3]
    assert found[0][0] == [["0.0"], [], []]


def test_nothing_on_any_rank_is_refused_on_all():
    for did in ranks.outcomes(read, 2, (0, 0)):
        assert did.error.startswith("ValueError: windows needs at least one micro-batch on some")


def fails(rank, world):
    def stream():
        yield "a"
        yield "b"
        if rank == 1:
            raise OSError("the disk is gone")
        yield "c"

    seen = []
    try:
        for window in vb.windows(stream(), 1, group=distributed.group.WORLD):
            seen.extend(window)
    except (OSError, RuntimeError) as error:
        return seen, f"{type(error).__name__}: {error}"


def test_a_loader_that_fails_on_one_rank_ends_all_before_the_same_window():
    (first, told), (second, own) = ranks.run(fails, 2, group_limit=5)
    assert first == second == ["a", "b"]
    assert own == "OSError: the disk is gone"
    assert told.startswith(
        "RuntimeError: Every rank must be able to read its stream. Got an error in"
    )


class BeginsAnew:
    """An iterator that begins anew when it is asked after its end."""

    def __init__(self):
        self.given = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.given += 1
        if self.given % 2 == 0:
            raise StopIteration
        return "x"


def ends_once(rank, world):
    stream = BeginsAnew() if rank == 0 else "abcdefg"
    return [len(window) for window in vb.windows(stream, 2, group=distributed.group.WORLD)]


def test_a_stream_that_has_ended_is_not_asked_again():
    assert ranks.run(ends_once, 2) == [[1, 0, 0, 0], [2, 2, 2, 1]]


X = torch.arange(22, dtype=torch.float64).reshape(11, 2) / 7


def one_epoch(rank, world, until, start):
    """The weights after windows of 4 rows a rank, and where a later run begins."""
    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Linear(2, 1).double())
    if start is not None:
        net.module.load_state_dict(start)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = DataLoader(Subset(TensorDataset(X), range(rank, len(X), world)), batch_size=2)
    windows = vb.windows(loader, accumulation_steps=2, group=distributed.group.WORLD)
    for number, window in enumerate(windows):
        if number in until:
            optimizer.zero_grad()
            vb.backward(lambda x: net(x[0]).square().mean(), window, module=net)
            optimizer.step()
    return net.module.state_dict()


def test_an_epoch_of_uneven_ranks_is_that_of_one_process_also_when_it_is_resumed():
    (whole, same) = ranks.run(one_epoch, 2, (0, 1), None)
    (half, _) = ranks.run(one_epoch, 2, (0,), None)
    (resumed, _) = ranks.run(one_epoch, 2, (1,), half)
    torch.manual_seed(0)
    net = torch.nn.Linear(2, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    # Of 11 rows rank 0 has six, in windows of 4 and 2, and rank 1 has 4 and 1.
    for rows in (X[:8], X[8:]):
        optimizer.zero_grad()
        net(rows).square().mean().backward()
        optimizer.step()
    for found in (whole, same, resumed):
        torch.testing.assert_close(found, dict(net.state_dict()), rtol=1e-12, atol=1e-12)


def test_without_a_group_it_has_the_length_of_its_stream():
    found = vb.windows("abcde", 2)
    assert len(found) == 3
    assert [list(window) for window in found] == [["a", "b"], ["c", "d"], ["e"]]


def has_no_length(rank, world):
    found = vb.windows("abcde", 2, group=distributed.group.WORLD)
    try:
        return len(found)
    except TypeError:
        return repr(found)


def test_with_a_group_it_has_no_length():
    assert ranks.run(has_no_length, 1) == ["Windows of 2 micro-batches on each rank"]


@pytest.mark.parametrize("group", [False, -100, "world"])
def test_what_is_no_group_is_refused(group):
    with pytest.raises(TypeError, match=r"group must be a process group .* Got (bool|int|str)\."):
        vb.windows("abc", 2, group=group)
