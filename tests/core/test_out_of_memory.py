"""What is said when memory runs out."""

import sys
from typing import ClassVar

import pytest

from virtualbatch.plan.out_of_memory import (
    MemoryErrors,
    any_of,
    bytes_asked,
    free_frames,
    in_words,
    no_smaller_size,
)


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 400 bytes.", 400),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity", 2.5 * 2**30),
        ("MPS backend out of memory (MPS allocated: 1 GB). Tried to allocate 96 B on", 96),
        ("RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes.", 4096),
        ("Unable to allocate 7.00 KiB for an array with shape (7, 1024)", 7 * 1024),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.00GiB on device", 2 * 2**30),
        ("RESOURCE_EXHAUSTED: Attempting to allocate 4.00G. That was not", 4 * 2**30),
        ("OOM when allocating tensor with shape[10,10] and type float", 400),
        ("OOM when allocating tensor with shape[64,1048576] and type half on", 128 * 2**20),
        ("OOM when allocating tensor with shape[3] and type variant", None),
        ("OOM when allocating tensor", None),
        ("", None),
    ],
)
def test_bytes_are_read_from_the_text(text, asked):
    assert bytes_asked(text) == asked


def test_the_error_says_what_was_asked_for_and_what_to_do():
    error = no_smaller_size(
        RuntimeError("you tried to allocate 1048576 bytes"), 2**19, [("head.weight", 2**21)]
    )
    assert isinstance(error, MemoryError)
    text = str(error)
    assert text.startswith("A micro-batch of one row must fit in memory. Got one row, and 1.0 MiB ")
    assert "more were asked for with 512.0 KiB left. " in text
    assert "head.weight (2.0 MiB)" in text
    assert "checkpointing" in text


def test_what_is_not_known_is_not_said():
    text = str(no_smaller_size(MemoryError(), None, []))
    assert "Got one row, and memory ran out. Nothing" in text
    assert "The largest parameters are none." in text


def test_an_error_in_words_keeps_the_text_of_who_raised_it_by_hand():
    errors = MemoryErrors((), (MemoryError,), any_of("no memory"), any_of("no handle"))
    assert in_words(MemoryError(), errors) == "memory ran out"
    assert in_words(MemoryError("my pool is empty"), errors) == "MemoryError: my pool is empty"


class Held:
    """What a frame holds."""

    alive: ClassVar[set[str]] = set()

    def __init__(self, name):
        self.name = name
        self.alive.add(name)

    def __del__(self):
        self.alive.discard(self.name)


def fails(name, error):
    held = Held(name)
    raise error(held.name)


def fails_again(error):
    try:
        fails("first", ValueError)
    except ValueError as first:
        if error is KeyError:
            raise KeyError("from") from first
        fails("second", error)


@pytest.mark.parametrize("error", [TypeError, KeyError])
def test_what_chained_errors_hold_is_freed_and_the_caller_keeps_what_is_his(error):
    try:
        fails("caller's", OSError)
    except OSError:
        try:
            fails_again(error)
        except error as found:
            failed = found
        assert failed.__context__.__context__ is sys.exception()
        assert Held.alive >= {"caller's", "first"}
        free_frames(failed)
        assert Held.alive == {"caller's"}


def test_errors_that_name_each_other_come_to_an_end():
    first, second = ValueError(), ValueError()
    first.__context__, second.__cause__ = second, first
    free_frames(first)
