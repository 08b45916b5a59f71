"""What is said of losses that are not finite."""

import math

import pytest

from virtualbatch.window.not_finite import LateLosses, LossWatch, rows_in_order
from virtualbatch.window.window import Window

NAN, INF = math.nan, math.inf


def hear(watch, losses, rows=None):
    """A window of these losses, or terms, as an engine tells of it."""
    terms = [loss if isinstance(loss, dict) else {"loss": loss} for loss in losses]
    if watch.listens(sum(value for found in terms for value in found.values())):
        watch.hear(terms, rows or [4] * len(losses))


def test_the_first_micro_batch_its_rows_and_its_value_are_named(caplog):
    watch = LossWatch()
    hear(watch, [1.0, 2.0, 3.0])
    assert not caplog.messages
    hear(watch, [1.0, -INF, 3.0], [4, 3, 3])
    (message,) = caplog.messages
    assert caplog.records[0].name == "virtualbatch"
    assert caplog.records[0].levelname == "WARNING"
    assert message == (
        "The loss is -inf in micro-batch 2 of 3 of window 2 (rows 4 to 6 of its batch), so its "
        "update cannot be trusted. Look at its rows, and leave the update out. "
        "See docs/guides/not_finite.md."
    )


def test_it_is_said_again_only_after_a_finite_window(caplog):
    watch = LossWatch()
    for losses, count in [
        ([1.0, NAN], 1),
        ([NAN, NAN], 1),
        ([NAN, 1.0], 1),
        ([1.0, 1.0], 1),
        ([NAN, 1.0], 2),
    ]:
        hear(watch, losses)
        assert len(caplog.messages) == count
    assert "micro-batch 1 of 2 of window 5" in caplog.messages[1]


@pytest.mark.parametrize(
    ("losses", "rows", "text"),
    [
        ([1.0, INF, 2.0, NAN], None, "(rows 4 to 7 of its batch), the first of 2 such, so"),
        ([1.0, NAN], [None, None], "in micro-batch 2 of 2 of window 1, so"),
        ([1.0, NAN], [None, 4], "in micro-batch 2 of 2 of window 1, so"),
        ([NAN], None, "The loss is nan in window 1 (rows 0 to 3 of its batch), so"),
        ([{}, {"ce": 1.0, "kl": NAN}], None, "Term 'kl' of the loss is nan in micro-batch 2 of 2"),
        ([NAN, INF], None, "in each of 2 micro-batches of window 1: parameters"),
    ],
)
def test_what_is_said(caplog, losses, rows, text):
    hear(LossWatch(), losses, rows)
    (message,) = caplog.messages
    assert text in message


def test_what_else_is_not_finite_is_called_by_its_name(caplog):
    watch = LossWatch()
    assert watch.listens(NAN)
    watch.hear([{"loss": 0.0}, {"loss": NAN}], [4, 4], "What it predicts")
    assert caplog.messages[0].startswith("What it predicts is not finite in micro-batch 2 of 2 of")


def test_where_all_else_is_finite_the_window_is_named(caplog):
    watch = LossWatch()
    assert watch.listens(INF)
    watch.hear([{"loss": 0.0}, {"loss": 0.0}], [4, 4], "What it predicts")
    assert caplog.messages[0].startswith("The loss is inf in window 1, so its update")


def test_nothing_is_said_of_finite_losses_whose_sum_is_not(caplog):
    watch = LossWatch()
    assert watch.listens(INF)
    watch.hear([{"loss": 1.0}, {"loss": 1.0}], [4, 4])
    assert not caplog.messages


def test_a_device_is_not_waited_for(caplog):
    there, heard = [], []
    late = LateLosses(lambda entry, is_latest: entry in there, heard.append)
    late.take("first")
    late.take("second")
    assert heard == []
    # Windows keep their order.
    there.append("second")
    late.take("third")
    assert heard == []
    there.append("first")
    late.take("fourth")
    assert heard == ["first", "second"]
    late.hear_all()
    assert heard == ["first", "second", "third", "fourth"]


def test_the_latest_window_may_be_left_to_the_next_one():
    heard = []
    late = LateLosses(lambda entry, is_latest: not is_latest, heard.append)
    for entry in range(3):
        late.take(entry)
        assert heard == list(range(entry))


def test_rows_that_were_sorted_have_no_place_in_the_batch():
    microbatches = [[1, 2], [3]]
    assert rows_in_order(Window(microbatches), [2, 1]) == [2, 1]
    assert rows_in_order(Window(microbatches, sorted_rows=True), [2, 1]) == [None, None]
