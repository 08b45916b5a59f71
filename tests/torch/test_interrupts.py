"""An interrupt at any place leaves a window undone or done: the attack, and what answers it."""

import inspect
import random
import signal

import pytest
import torch
from tests.tiers import tiered
from tests.torch.interrupted import LONG, WINDOWS, nested, plain, rows, with_aux
from tests.torch.interrupts import Alarm, Attack, State, Subject, Tracer
from torch import nn

import virtualbatch.torch as vb
from virtualbatch.torch import _commit
from virtualbatch.torch._batchnorm import MergedStatistics
from virtualbatch.torch._rowwise import hooks
from virtualbatch.torch._signals import held_back
from virtualbatch.torch._undo import Undo, all_or_nothing

SIGNALS = 5000


def attacked(kind, chosen, opcodes=False):
    """The places that leave something between before and done, with what that is."""
    attack = Attack({**WINDOWS, **LONG}[kind])
    found = {}
    for at in chosen(attack.places(opcodes)):
        tracer = Tracer(at, opcodes)
        between = attack.between(tracer)
        if between:
            found[at, tracer.places[-1]] = between
    return found


def some(count):
    return lambda places: sorted(
        random.Random(0).sample(range(1, len(places) + 1), min(count, len(places)))
    )


def every(places):
    return range(1, len(places) + 1)


# Running on shapes imports the compiler.
QUICK = [kind for kind in WINDOWS if kind != "has_aux"]


@pytest.mark.parametrize("kind", tiered(WINDOWS, QUICK, "imports the compiler"))
def test_an_interrupt_at_some_lines(kind):
    assert attacked(kind, some(4)) == {}


def test_an_interrupt_at_each_line_that_attaches_commits_or_switches_recording():
    source, start = inspect.getsourcelines(MergedStatistics.attached)
    attaching = (f"_batchnorm.py:{start + k} " for k in range(len(source)))
    close = ("_commit.py", "grad_mode.py", *attaching)

    def chosen(places):
        once = {place: k for k, place in reversed(list(enumerate(places, 1)))}
        return sorted(k for place, k in once.items() if place.startswith(close))

    assert attacked("float32", chosen) == {}


@pytest.mark.thorough("thousands of windows for each kind")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", WINDOWS)
def test_an_interrupt_at_every_line(kind):
    assert attacked(kind, every) == {}


@pytest.mark.thorough("thousands of windows for each kind")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["no grad before", "bfloat16", "stats", "loss"])
def test_an_interrupt_at_some_opcodes(kind):
    assert attacked(kind, some(2000), opcodes=True) == {}


@pytest.mark.thorough("each call tries, plans or certifies")
@pytest.mark.timeout(1800)
@pytest.mark.proves_itself
@pytest.mark.parametrize("kind", LONG)
def test_an_interrupt_at_some_lines_of_what_takes_longer(kind):
    assert attacked(kind, some(200)) == {}


def signalled(kind, count, seconds):
    attack = Attack(WINDOWS[kind])
    numbers = random.Random(0)
    found = [attack.between(Alarm(numbers.uniform(1e-5, seconds))) for _ in range(count)]
    assert any(between is not None for between in found)
    return [between for between in found if between]


# What is raised inside a `__del__` or the callback of a weak reference goes nowhere.
UNHEARD = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@UNHEARD
def test_some_signals():
    assert signalled("float32", 30, 0.004) == []


@UNHEARD
@pytest.mark.thorough("thousands of windows")
@pytest.mark.parametrize("kind", WINDOWS)
def test_signals_while_a_window_runs(kind):
    assert signalled(kind, SIGNALS // len(WINDOWS) + 1, 0.01) == []


def test_the_attack_finds_what_is_put_back_too_late():
    def make():
        module = nn.BatchNorm1d(3)

        def call():
            momentum = module.momentum
            module.momentum = 1.0
            vb.loss(
                lambda x: module(x).mean(), rows(), module=module, microbatch_size=4, check=False
            )
            module.momentum = momentum

        return Subject([module], [], call)

    attack = Attack(make)
    assert "0. momentum" in attack.between(Tracer(20))


def test_interrupts_one_after_another_do_not_stop_what_is_put_back():
    done = []

    def put_back():
        done.append(len(done))
        if len(done) < 3:
            raise KeyboardInterrupt

    def run():
        with Undo(put_back):
            raise ValueError

    with pytest.raises(KeyboardInterrupt):
        all_or_nothing(run)
    assert done == [0, 1, 2]


def test_one_thing_that_cannot_be_put_back_does_not_stop_the_others():
    done = []

    def run():
        with Undo(lambda: done.append("first")), Undo(lambda: 1 / 0):
            raise ValueError

    with pytest.raises(ZeroDivisionError):
        all_or_nothing(run)
    assert done == ["first"]


def test_what_was_changed_last_is_put_back_first():
    """Also where its own way out was cut, and the ways out around it were not."""
    order = []
    cuts = iter([KeyboardInterrupt])

    def last():
        for error in cuts:
            raise error
        order.append("last")

    def run():
        with Undo(lambda: order.append("first")), Undo(last):
            pass

    with pytest.raises(KeyboardInterrupt):
        all_or_nothing(run)
    assert order == ["last", "first"]


def test_what_was_put_back_is_not_put_back_again_when_a_generator_is_closed():
    done = []

    def changed():
        with Undo(lambda: done.append(1)):
            yield

    waiting = changed()

    def run():
        next(waiting)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        all_or_nothing(run)
    waiting.close()
    assert done == [1]


def test_what_code_in_between_swallows_is_put_back_at_the_end():
    done = []

    def run():
        try:
            Undo(lambda: done.append(1)).__enter__()
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            return "went on"

    assert all_or_nothing(run) == "went on"
    assert done == [1]


def test_signals_wait_while_they_are_held_back():
    came = []

    def handler(number, frame):
        came.append(number)
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, handler)

    def wait():
        with held_back():
            signal.raise_signal(signal.SIGALRM)
            assert came == []

    try:
        with pytest.raises(TimeoutError):
            wait()
        assert came == [signal.SIGALRM]
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("fails", [False, True])
def test_signals_that_wait_are_not_lost_where_something_fails(fails):
    came = []

    def handler(number, frame):
        came.append(number)
        raise TimeoutError

    numbers = [signal.SIGALRM, signal.SIGUSR1]
    before = [signal.signal(number, handler) for number in numbers]

    def wait():
        with held_back():
            for number in numbers:
                signal.raise_signal(number)
            if fails:
                raise ValueError

    try:
        with pytest.raises(TimeoutError):
            wait()
        assert came == numbers
    finally:
        for number, each in zip(numbers, before, strict=True):
            signal.signal(number, each)


@pytest.mark.proves_itself
@pytest.mark.parametrize(("call", "size"), [(1, 4), (2, 4), (5, 4), (1, 8)])
def test_an_alarm_in_a_first_window_is_no_fault_of_the_loss(call, size):
    """Its error comes out, and is not told as that of a loss that cannot be tried."""
    subject = plain()
    calls = []

    class Handler:
        def __call__(self, number, frame):
            raise RuntimeError("too late")

    def loss_fn(x):
        calls.append(len(x))
        if len(calls) == call:
            signal.raise_signal(signal.SIGALRM)
        return (subject(x) ** 2).mean()

    before = signal.signal(signal.SIGALRM, Handler())
    try:
        with pytest.raises(RuntimeError, match="too late"):
            vb.backward(loss_fn, rows(), module=subject, microbatch_size=size)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(calls) == call


def test_a_hook_is_called_after_a_rowwise_backward_pass_that_failed(monkeypatch):
    """It was set aside for that pass; PyTorch does not say when such a one ends."""
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    heard = []
    unused.register_post_accumulate_grad_hook(heard.append)
    used.register_hook(lambda gradient: 1 / 0)
    # As where a new gradient lies where the one before did.
    monkeypatch.setattr(hooks, "_grad_of", lambda x: (0, 0))
    encode = vb.rowwise(lambda x: x * used, module=[used, unused], microbatch_size=4, check=False)
    with pytest.raises(ZeroDivisionError):
        encode(rows()).sum().backward()
    assert heard == []
    unused.sum().backward()
    assert heard == [unused]


def test_gradients_that_are_one_tensor_are_both_added():
    """As PyTorch's own accumulation adds them, whatever tells that an addition was made."""
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    both = torch.zeros(2)
    for weight in weights:
        weight.grad = both
    x = torch.ones(4, 2)
    vb.backward(
        lambda x: (x * (weights[0] + 2 * weights[1])).sum(1).mean(),
        x,
        module=weights,
        microbatch_size=2,
        check=False,
    )
    assert both.tolist() == [3.0, 3.0]


def test_memory_that_runs_out_in_a_commit_does_not_add_gradients_twice(monkeypatch):
    """Another attempt, with smaller micro-batches, would."""
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    for weight in weights:
        weight.grad = torch.zeros(2)
    errors = iter([None, torch.OutOfMemoryError("CUDA out of memory.")])

    def add(total, found):
        error = next(errors, None)
        if error is not None:
            raise error
        total.add_(found)

    monkeypatch.setattr(_commit, "_add", add)
    x = torch.ones(4, 2)
    with pytest.raises(RuntimeError, match="while gradients are added"):
        vb.backward(
            lambda x: (x * (weights[0] + 2 * weights[1])).sum(1).mean(),
            x,
            module=weights,
            microbatch_size=2,
            check=False,
        )
    assert [weight.grad.tolist() for weight in weights] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.thorough("imports the compiler")
def test_what_a_loss_does_on_shapes_stays_in_no_buffer():
    module = nested()
    vb.backward(
        with_aux(module), rows(), module=module, microbatch_size=4, has_aux=True, check=False
    )
    assert type(module[2][0].last) is torch.Tensor


@pytest.mark.parametrize("kind", ["float32", "bfloat16 sums"])
def test_the_next_window_is_as_if_there_had_been_no_interrupt(kind):
    """Its random numbers too, by which sums of bfloat16 are rounded."""
    found = []
    places = Attack(WINDOWS[kind]).places()
    ran = next(k for k, place in enumerate(places, 1) if place.startswith("_commit.py"))
    for interrupted in (False, True):
        subject = WINDOWS[kind]()
        state = State(subject)
        if interrupted:
            assert Tracer(ran).run(subject.call)
        subject.call()
        found.append(state.now())
    assert found[0] == found[1]
