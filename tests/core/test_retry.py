"""The loop that runs a window again: what it raises, what it keeps, what it puts back."""

import logging
import re

import pytest

from virtualbatch.plan.auto import CurrentSize
from virtualbatch.plan.out_of_memory import MemoryErrors, any_of
from virtualbatch.plan.retry import Memory, run_until_it_fits

CERTAIN, AMBIGUOUS = "allocator: no memory", "could not start (a library)"
ERRORS = MemoryErrors((), (RuntimeError, MemoryError), any_of(CERTAIN), any_of(AMBIGUOUS))
MEMORY = Memory(ERRORS, lambda: 2**20)


class Window:
    """A window of so many rows that raises, one after another, what it is told to."""

    def __init__(self, *errors, rows=8):
        self.errors, self.size = list(errors), CurrentSize(rows, None)
        self.cuts, self.put_back = [], 0

    def run(self, cut):
        self.cuts.append(cut)
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        return f"{cut} rows"

    def undo(self):
        self.put_back += 1

    def result(self, **options):
        return run_until_it_fits(
            self.run, self.size.rows, int, int, self.size, MEMORY,
            lambda: [("kernel", 2**20)], put_back=self.undo, **options,
        )  # fmt: skip


@pytest.mark.parametrize("text", [CERTAIN, AMBIGUOUS])
def test_a_window_runs_again_in_smaller_pieces(text):
    window = Window(RuntimeError(text), RuntimeError(text))
    assert window.result() == "2 rows"
    assert (window.cuts, window.put_back, window.size.rows) == ([8, 4, 2], 2, 2)


def test_memory_that_runs_out_while_a_window_is_cut_is_no_other_error():
    window = Window(RuntimeError(CERTAIN))

    def smaller(rows):
        raise RuntimeError(f"{CERTAIN} for the pieces")

    with pytest.raises(MemoryError, match=r"A micro-batch of one row must fit in memory\."):
        run_until_it_fits(
            window.run, 8, int, smaller, window.size, MEMORY, list, put_back=window.undo
        )
    assert (window.cuts, window.size.rows) == ([8], 1)


def test_an_ambiguous_error_that_comes_back_at_one_row_is_raised_unchanged(caplog):
    errors = [RuntimeError(f"{AMBIGUOUS} {rows}") for rows in (8, 4, 2, 1)]
    window = Window(*errors)
    with caplog.at_level(logging.WARNING, "virtualbatch"), pytest.raises(RuntimeError) as raised:
        window.result()
    assert raised.value is errors[0]
    assert raised.value.__context__ is raised.value.__cause__ is None
    # Memory was not the reason, so the next window is not cut smaller.
    assert (window.cuts, window.put_back, window.size.rows) == ([8, 4, 2, 1], 4, 8)
    assert f"may mean that memory ran out: {AMBIGUOUS} 8" in caplog.text


@pytest.mark.parametrize("order", [1, -1])
def test_a_certain_error_on_the_way_makes_it_a_memory_error(order):
    last = RuntimeError((CERTAIN, AMBIGUOUS)[::order][1])
    window = Window(RuntimeError((CERTAIN, AMBIGUOUS)[::order][0]), last, rows=2)
    with pytest.raises(MemoryError, match=r"one row must fit.*1\.0 MiB left.*kernel") as raised:
        window.result()
    assert raised.value.__cause__ is last


def test_other_errors_are_raised_at_once():
    window = Window(RuntimeError("no such thing"))
    with pytest.raises(RuntimeError, match="no such thing"):
        window.result()
    assert (window.cuts, window.put_back) == ([8], 0)


def test_nothing_runs_again_where_more_was_written_than_can_be_undone():
    window = Window(MemoryError("of the optimizer"), MemoryError("of the optimizer"))
    with pytest.raises(MemoryError, match="of the optimizer"):
        window.result(is_too_late=lambda error: "optimizer" in str(error))
    assert (window.cuts, window.put_back, window.size.rows) == ([8], 0, 8)


@pytest.mark.parametrize("text", ["my pool is empty", "my pool of 3 slots is empty", "7"])
def test_a_memory_error_raised_by_hand_is_tried_once_more_and_raised_as_it_was(text):
    errors = [MemoryError(text), MemoryError(text)]
    window = Window(*errors)
    with pytest.raises(MemoryError) as raised:
        window.result()
    assert raised.value is errors[0]
    assert raised.value.args == (text,)
    assert raised.value.__context__ is raised.value.__cause__ is None
    assert (window.cuts, window.put_back, window.size.rows) == ([8, 4], 2, 8)


def test_one_that_a_smaller_size_ends_was_real():
    window = Window(MemoryError("my pool is empty"))
    assert window.result() == "4 rows"
    assert window.size.rows == 4


def test_one_of_a_single_row_is_raised_at_once():
    error = MemoryError("my pool is empty")
    window = Window(error, rows=1)
    with pytest.raises(MemoryError) as raised:
        window.result()
    assert raised.value is error
    assert (window.cuts, window.size.rows) == ([1], 1)


@pytest.mark.parametrize(
    ("errors", "cuts", "rows"),
    [
        # The size that memory really asked for is kept.
        ([CERTAIN, None, None], [8, 4, 2], 4),
        ([None, CERTAIN, None], [8, 4, 2], 2),
        ([CERTAIN, CERTAIN, CERTAIN, None], [8, 4, 2, 1], 1),
        ([AMBIGUOUS, None, None], [8, 4, 2], 8),
    ],
)
def test_beside_other_errors_it_is_raised_all_the_same(errors, cuts, rows):
    raised = [MemoryError("empty") if text is None else RuntimeError(text) for text in errors]
    window = Window(*raised)
    with pytest.raises(MemoryError) as found:
        window.result()
    assert found.value is raised[errors.index(None)]
    assert (window.cuts, window.size.rows) == (cuts, rows)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "std::bad_alloc",
        "Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type int64",
        "Unable to allocate array with shape (10, 10) and data type float64",
        "malloc: tried to allocate 400 bytes",
        CERTAIN,
    ],
)
def test_a_memory_error_of_an_allocator_is_tried_down_to_one_row(text):
    window = Window(*(MemoryError(text) for _ in range(4)))
    with pytest.raises(MemoryError, match=r"A micro-batch of one row must fit in memory\."):
        window.result()
    assert (window.cuts, window.size.rows) == ([8, 4, 2, 1], 1)


def test_what_numpy_and_python_raise_is_of_an_allocator():
    import numpy as np

    for allocate in (lambda: np.empty(2**58), lambda: bytearray(2**62)):
        with pytest.raises(MemoryError) as raised:
            allocate()
        assert ERRORS.is_certain(raised.value)


def test_texts_are_read_word_for_word_and_only_in_errors_of_their_kind():
    assert ERRORS.is_certain(MemoryError())
    assert ERRORS.is_certain(RuntimeError(f"here: {CERTAIN}."))
    assert not ERRORS.is_certain(RuntimeError(AMBIGUOUS))
    assert ERRORS.is_possible(RuntimeError(AMBIGUOUS))
    assert not ERRORS.is_possible(KeyError(CERTAIN))
    assert ERRORS.is_by_hand(MemoryError("my pool is empty"))
    assert not ERRORS.is_possible(MemoryError("my pool is empty"))
    assert not ERRORS.is_by_hand(RuntimeError("my pool is empty"))
    assert any_of("a.b", "c").pattern == f"{re.escape('a.b')}|c"
