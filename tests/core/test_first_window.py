"""The law on a few rows: which are tried, what is refused, and what is remembered."""

import logging
import math

import numpy as np
import pytest

from virtualbatch.certify.certificate import Certificate, Finding
from virtualbatch.certify.diagnosis import SEES_OTHER_ROWS
from virtualbatch.certify.first_window import prove
from virtualbatch.certify.proven import Proven, Seen
from virtualbatch.certify.trial import Distance, Trial, UntriedError, parts

pytestmark = pytest.mark.proves_itself

RIGHT, WRONG = Distance(1.0, False, {}), Distance(1e6, False, {})


def of(kind, why="why."):
    return Certificate(False, 1.0, 0.0, {}, (Finding(kind, "here", why, "Fix it."),))


EXACT = Certificate(True, 0.0, 0.0, {}, ())


class Scripted(Trial):
    """A trial whose distances and certificates are given by the rows of a part."""

    def __init__(self, distances, certificate=EXACT, rows=100, sizes=(10, 10)):
        self.rows, self.sizes = rows, sizes
        self.given, self.found = distances, certificate
        self.certified, self.masks = [], None

    def leaves(self, rows):
        return {"m": self.masks[list(rows)]} if self.masks is not None else {}

    def distance(self, a, b):
        given = self.given.get((len(a), len(b)), RIGHT)
        if isinstance(given, Exception):
            raise given
        return given

    def certificate(self, rows, size):
        self.certified.append((len(rows), size))
        found = self.found(rows) if callable(self.found) else self.found
        if isinstance(found, Exception):
            raise found
        return found


@pytest.mark.parametrize("pair", [(4, 5), (5, 4), (2, 9)])
def test_unequal_parts_stay_unequal_where_rows_are_few(pair):
    # Of equal parts a weight that is 1 for all of them shows nothing.
    trial = Scripted({}, rows=6)
    trial.pairs = (pair,)
    ((a, b),) = parts(trial)
    assert (len(a) < len(b)) == (pair[0] < pair[1])
    assert not {*a} & {*b}


def proved(trial):
    return prove(trial, lambda error: f"an error: {error}")


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (1, []),
        (2, [(1, 1)]),
        (3, [(1, 1), (1, 2)]),
        (4, [(1, 1), (1, 2), (2, 2)]),
        (7, [(1, 1), (1, 2), (3, 4)]),
        (8, [(1, 1), (1, 2), (4, 4)]),
        (1000, [(1, 1), (1, 2), (4, 4)]),
    ],
)
def test_parts_are_other_rows_of_the_batch(rows, sizes):
    found = parts(Scripted({}, rows=rows))
    assert [(len(a), len(b)) for a, b in found] == sizes
    for a, b in found:
        assert len({*a, *b}) == len(a) + len(b)
        assert {*a, *b} <= set(range(rows))
    if rows == 1000:
        assert found[-1] == ([0, 141, 286, 427], [572, 713, 858, 999])


def test_the_parts_differ_by_what_the_arrays_count():
    # Evenly spaced rows count alike here: one of each pair, and every second one.
    for masks in (np.arange(16) % 2 == 0, np.r_[np.ones(12), np.zeros(4)]):
        trial = Scripted({}, rows=16)
        trial.masks = np.asarray(masks)
        _, two, eight = ((masks[a].mean(), masks[b].mean()) for a, b in parts(trial))
        assert eight[0] > 0
        assert eight[1] > 0
        assert eight[0] != eight[1]
        assert two[0] != two[1]


def test_a_micro_batch_without_weight_takes_pairs_of_its_own():
    trial = Scripted({}, rows=100)
    trial.empty, trial.full = range(50, 53), range(60, 70)
    every, lacking = parts(trial)[:3], parts(trial)[3:]
    assert [(len(a), len(b)) for a, b in every] == [(1, 1), (1, 2), (4, 4)]
    assert lacking == [([50], [60, 63]), ([50], [66, 69])]


def test_few_rows_that_count_are_found_among_many():
    trial = Scripted({}, rows=200)
    trial.masks = np.zeros(200)
    trial.masks[[6, 21, 40, 77, 90, 130, 140, 150, 199]] = [1, 1, 1, 1, 5, 1, 1, 1, 1]
    *_, eight = parts(trial)
    first, second = (trial.masks[list(part)].sum() for part in eight)
    assert first > 0
    assert second > 0
    assert first != second


def test_what_adds_up_is_not_certified():
    trial = Scripted({})
    assert proved(trial) is None
    assert trial.certified == []


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("weight", "weights"),
        ("sum_loss", "weights"),
        ("coupled_rows", "rowwise"),
        ("stateful", "state"),
    ],
)
def test_what_does_not_add_up_is_refused_with_its_page(kind, page):
    text = rf"must add up to that of their batch\. Got .*{kind} at here\. why\. Fix it\. "
    text += f"See docs/guides/{page}"
    with pytest.raises(ValueError, match=text):
        proved(Scripted({(4, 4): WRONG}, of(kind)))


def test_rounding_is_never_refused():
    trial = Scripted({(1, 1): WRONG, (1, 2): WRONG, (4, 4): WRONG}, EXACT)
    assert proved(trial) is None
    assert trial.certified == [(2, 1), (3, 2), (8, 4)]


def test_the_cause_is_told_by_more_rows_than_showed_it():
    def found(rows):
        return of("weight") if len(rows) == 8 else of("coupled_rows")

    with pytest.raises(ValueError, match="weight at here"):
        proved(Scripted({(1, 1): WRONG}, found))
    # But by those that showed it where more of them hide it, or cannot be run.
    for others in (EXACT, TypeError("odd rows")):
        with pytest.raises(ValueError, match="coupled_rows at here"):
            proved(
                Scripted(
                    {(1, 1): WRONG},
                    lambda rows, others=others: others if len(rows) == 8 else of("coupled_rows"),
                )
            )


def test_what_is_no_fault_of_the_loss_is_told_and_not_refused():
    assert proved(Scripted({(1, 1): WRONG}, of("batchnorm"))) == "batchnorm at here: why."


def test_what_draws_random_numbers_is_certified_at_once_with_all_rows():
    trial = Scripted({(1, 1): None})
    assert proved(trial) is None
    assert trial.certified == [(8, 4)]
    with pytest.raises(ValueError, match="weight at here"):
        proved(Scripted({(1, 1): None}, of("weight")))
    # And with those that an empty micro-batch adds, which the largest pair does not show.
    trial = Scripted({(1, 1): None})
    trial.empty, trial.full = range(50, 53), range(60, 70)
    assert proved(trial) is None
    assert trial.certified == [(8, 4), (3, 2), (3, 2)]


@pytest.mark.parametrize(
    ("distance", "reason"),
    [
        (RuntimeError("odd"), "an error: odd"),
        (UntriedError("it draws"), "it draws"),
        (Distance(math.nan, False, {}), "its gradient is 0, or not finite"),
    ],
)
def test_what_cannot_be_tried_says_why(distance, reason):
    every = dict.fromkeys([(1, 1), (1, 2), (4, 4)], distance)
    assert proved(Scripted(every)) == reason
    # One pair that can be tried is enough.
    assert proved(Scripted({(1, 1): distance})) is None


def test_one_row_cannot_be_tried():
    assert proved(Scripted({}, rows=1)) == "there is one row"


def test_rows_that_belong_together_may_stay_together(caplog):
    coupled = of("coupled_rows", SEES_OTHER_ROWS)
    trial = Scripted({(1, 1): WRONG}, coupled, sizes=[4, 6])
    assert proved(trial) is None
    assert "belong together by 2" in caplog.text
    trial.seen.check_sizes([4, 6, 2])
    with pytest.raises(ValueError, match=r"a multiple of 2\. Got micro-batches of 4, 3 rows\."):
        trial.seen.check_sizes([4, 3])
    # Some micro-batch cuts them apart; or they belong to more rows than two.
    for sizes, further in (([4, 5], {}), ([4, 4], {(2, 2): WRONG, (2, 4): WRONG, (4, 8): WRONG})):
        with pytest.raises(ValueError, match="coupled_rows"):
            proved(Scripted({(1, 1): WRONG, **further}, coupled, sizes=sizes))


def test_a_term_without_a_gradient_is_refused():
    accuracy = Distance(1.0, False, {"accuracy": 0.5, "off": 0.0})
    every = dict.fromkeys([(1, 1), (1, 2), (4, 4)], accuracy)
    with pytest.raises(ValueError, match=r"must have a gradient\. Got 'accuracy' without"):
        proved(Scripted(every))
    # What has one in some rows is a branch.
    assert proved(Scripted({(1, 1): accuracy})) is None


def test_a_loss_that_does_not_use_its_rows_is_told(caplog):
    same = Distance(0.0, True, {})
    assert proved(Scripted(dict.fromkeys([(1, 1), (1, 2), (4, 4)], same))) is None
    assert "the same whatever rows" in caplog.text
    caplog.clear()
    assert proved(Scripted({(1, 1): same})) is None
    assert not caplog.records


def test_distances_are_in_epsilons_of_the_largest_gradient():
    losses = [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]
    assert Distance.of([2.0, 4.0, 2**-18], [0.5, 0.5], losses, {}, 2**-20).off == 1.0
    # Without any gradient nothing is told.
    assert math.isnan(Distance.of([0.0, 0.0, 0.0], [0.5, 0.5], losses, {}, 2**-20).off)
    # A part that is 0 and another that is not.
    assert Distance.of([0.0, 0.0, 1.0], [0.5, 0.5], losses, {}, 2**-20).off == 2**20
    # Half precision is certified sooner.
    assert Distance.of([2.0, 4.0, 2**-5], [0.5, 0.5], losses, {}, 2**-7).off == 8.0
    assert math.isnan(Distance.of([1.0, math.inf, 1.0], [0.5, 0.5], losses, {}, 2**-20).off)


def test_the_same_loss_and_gradient_whatever_the_rows():
    same, other = [{"loss": 1.0}] * 3, [{"loss": 1.0}, {"loss": 1.0}, {"loss": 2.0}]
    assert Distance.of([1.0, 3.0, 0.0], [0.25, 0.75], same, {}, 1e-7).is_same
    assert not Distance.of([1.0, 3.0, 0.0], [0.25, 0.75], other, {}, 1e-7).is_same
    # A head of zeros gives one loss for all rows, and other gradients.
    assert not Distance.of([1.0, 2.0, 0.0], [0.25, 0.75], same, {}, 1e-7).is_same
    assert not Distance.of([0.0, 0.0, 0.0], [0.25, 0.75], same, {}, 1e-7).is_same


class Owner:
    def loss(self, batch):
        return batch

    def other(self, batch):
        return batch * 2


class Criterion:
    def __init__(self, reduction):
        self.reduction = reduction


def made(text):
    return lambda batch: (batch, text)


def test_a_loss_is_remembered_by_what_it_does():
    known, weight, owner = Proven(), (lambda batch: 1), Owner()
    first = made("a")
    assert not known.seen(first, weight, "x")
    known.remember(first, weight, "x", Seen(2))
    assert known.seen(first, weight, "x") == Seen(2)
    # Made anew it does the same; another structure, weight, closure or method does not.
    assert known.seen(made("a"), weight, "x")
    assert not known.seen(first, weight, "y")
    assert not known.seen(first, "sum", "x")
    assert not known.seen(made("b"), weight, "x")
    known.remember(owner.loss, None, "x", Seen())
    assert known.seen(owner.loss, None, "x")
    assert not known.seen(owner.other, None, "x")


def test_plain_values_tell_losses_apart_until_they_change_all_the_time():
    known = Proven()
    known.remember(made(Criterion("mean")), None, "x", Seen())
    assert known.seen(made(Criterion("mean")), None, "x") == Seen()
    assert known.seen(made(Criterion("sum")), None, "x") is None
    for number in range(4):
        assert known.seen(made(number), None, "y") is None
        known.remember(made(number), None, "y", Seen())
    assert known.seen(made(99), None, "y") == Seen()


def test_a_weight_of_another_value_is_another_weight():
    known, loss = Proven(), made("a")

    def weight(padding):
        return lambda batch: batch != padding

    known.remember(loss, weight(-100), "x", Seen())
    assert known.seen(loss, weight(-100), "x") == Seen()
    assert known.seen(loss, weight(-1), "x") is None


def test_what_was_not_remembered_is_asked_again(caplog):
    caplog.set_level(logging.INFO)
    known = Proven()
    assert [known.seen(made("a"), None, "x") for _ in range(2)] == [None, None]
