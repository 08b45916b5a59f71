"""How a batch is cut: sizes, rows, and streams that come already cut."""

import copy
import dataclasses
import itertools
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtualbatch import Window, windows
from virtualbatch.window.cut import check_sizes, even_cut, rows_per_microbatch, sizes_disagree
from virtualbatch.window.tree import array_leaves, common_rows, mapped, rank
from virtualbatch.window.window import check_window

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Data:
    x: object
    y: object


ROWS = st.integers(1, 300)
SIZE = st.integers(1, 400)


class Open:
    """An array of a trace: its shape may hold None, or have no known rank."""

    class UnknownRank:
        rank = None

        def __len__(self):
            raise ValueError("Cannot take the length of shape with unknown rank.")

    def __init__(self, *shape, known_rank=True):
        self.shape = shape if known_rank else self.UnknownRank()


# Sizes


@pytest.mark.parametrize("size", [1, 32, 10**9, np.int32(4), np.int64(4)])
def test_positive_integers_are_sizes(size):
    check_sizes(size, None)
    check_sizes(None, size)


NOT_SIZES = [0, -1, True, False, 2.0, 0.5, "4", [4], (), float("nan"), np.float32(4), np.bool_(1)]


@pytest.mark.parametrize("size", NOT_SIZES, ids=repr)
def test_anything_else_is_refused_as_a_size(size):
    with pytest.raises(
        ValueError, match=r"microbatch_size must be a positive integer or \"auto\""
    ) as e:
        check_sizes(size, None)
    assert f"Got microbatch_size={size!r}. Pass the number of rows" in str(e.value)
    with pytest.raises(ValueError, match=r"accumulation_steps must be a positive integer\.") as e:
        check_sizes(None, size)
    assert f"Got accumulation_steps={size!r}. Pass the number of micro-batches" in str(e.value)


def test_one_size_is_needed():
    with pytest.raises(
        ValueError,
        match=r"Got neither microbatch_size nor accumulation_steps\. Pass microbatch_size=",
    ):
        check_sizes(None, None)


@given(ROWS, SIZE)
def test_steps_are_at_most_what_was_asked(rows, steps):
    size = rows_per_microbatch(rows, None, steps)
    assert size == -(-rows // steps)
    assert len(even_cut(rows, size)) <= steps


@given(ROWS, SIZE)
def test_agreeing_sizes_are_accepted_and_others_refused(rows, size):
    count = -(-rows // size)
    assert rows_per_microbatch(rows, size, count) == size
    with pytest.raises(
        ValueError,
        match=rf"must describe the same cut\. Got microbatch_size={size} and "
        rf"accumulation_steps={count + 1} for {rows} rows / {size} = {count} micro-batches\. "
        r"Pass only one of them\.",
    ):
        rows_per_microbatch(rows, size, count + 1)


def test_numpy_sizes_become_python_numbers():
    # A graph takes only a Python number for a static size.
    for size in (
        rows_per_microbatch(10, np.int64(4), None),
        rows_per_microbatch(10, None, np.int64(3)),
    ):
        assert type(size) is int
        assert size == 4


def test_rows_that_only_a_trace_knows_use_plain_arithmetic():
    class Traced:
        """Supports what the core may use on a traced number, and records it."""

        def __init__(self, text):
            self.text = text

        def __add__(self, other):
            return Traced(f"({self.text}+{other})")

        def __sub__(self, other):
            return Traced(f"({self.text}-{other})")

        def __floordiv__(self, other):
            return Traced(f"({self.text}//{other})")

    found = rows_per_microbatch(Traced("rows"), None, 4).text
    assert [eval(found, {"rows": rows}) for rows in (1, 4, 5, 8)] == [1, 1, 2, 2]
    assert rows_per_microbatch(Traced("rows"), 8, 4) == 8


def test_the_text_for_rows_known_at_run_time_only():
    assert "for the batch rows. Pass only one" in sizes_disagree("the batch", 4, 2)


def test_an_engine_that_forgot_the_sizes_is_told():
    with pytest.raises(ValueError, match=r"internal: rows_per_microbatch needs one"):
        rows_per_microbatch(4, None, None)


# The even cut


@given(ROWS, SIZE)
def test_the_even_cut_covers_every_row_once_in_order(rows, size):
    cut = even_cut(rows, size)
    assert [row for start, stop in cut for row in range(start, stop)] == list(range(rows))


@given(ROWS, SIZE)
def test_the_even_cut_is_even_and_fits(rows, size):
    sizes = [stop - start for start, stop in even_cut(rows, size)]
    assert len(sizes) == -(-rows // size)
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= min(sizes) <= max(sizes) <= size


def test_no_lonely_row():
    # 4, 4, 1 would hand a BatchNorm a single row.
    assert even_cut(9, 4) == [(0, 3), (3, 6), (6, 9)]


# Arrays and their rows

A, B = np.zeros((4, 2)), np.zeros(4)


@pytest.mark.parametrize(
    ("structure", "paths"),
    [
        (A, ["batch"]),
        ([A, B], ["batch[0]", "batch[1]"]),
        ((A, (B,)), ["batch[0]", "batch[1][0]"]),
        ({"x": A, 3: B}, ["batch['x']", "batch[3]"]),
        (OrderedDict(b=A, a=B), ["batch['b']", "batch['a']"]),
        (Pair(A, {"y": [B]}), ["batch.x", "batch.y['y'][0]"]),
        (Data(A, [B]), ["batch.x", "batch.y[0]"]),
        ([A, None, True, 2.5, "text", b"bytes", B], ["batch[0]", "batch[6]"]),
        (None, []),
        ("text", []),
        ({}, []),
    ],
    ids=str,
)
def test_arrays_are_named_by_the_expression_that_reaches_them(structure, paths):
    found = dict(array_leaves(structure))
    assert list(found) == paths
    names = {"batch": structure}
    for path, leaf in found.items():
        assert eval(path, names) is leaf


def test_a_structure_is_built_again_of_other_leaves():
    given = {"a": [A, Pair(2, (B,))], "b": OrderedDict(c=Data(A, None)), "d": ["two", "texts"]}
    found = mapped(lambda leaf: "new" if hasattr(leaf, "shape") else leaf, given)
    assert found == {
        "a": ["new", Pair(2, ("new",))],
        "b": OrderedDict(c=Data("new", None)),
        "d": ["two", "texts"],
    }
    assert type(found["b"]) is OrderedDict
    assert given["b"]["c"].x is A


def test_the_name_of_the_structure_itself_can_be_given():
    assert [path for path, _ in array_leaves([A], "window[3]")] == ["window[3][0]"]


@pytest.mark.parametrize(
    ("array", "axes"),
    [(A, 2), (np.float64(0), 0), (Open(None, 3), 2), (Open(known_rank=False), None)],
)
def test_rank(array, axes):
    assert rank(array) == axes


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ([A, B], 4),
        ([Open(None, 2), B], 4),
        ([A, Open(None)], 4),
        ([Open(known_rank=False), B, "text", None], 4),
        ([Open(None, 2), Open(None)], None),
        ([Open(known_rank=False)], None),
    ],
)
def test_rows_are_what_any_known_shape_says(batch, rows):
    assert common_rows(array_leaves(batch)) == rows


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (
            {"x": A, "y": np.zeros(5)},
            r"Got 4 rows in batch\['x'\] and 5 rows in batch\['y'\]\. Pass arrays that share",
        ),
        (
            (B, Open(None), [np.zeros((3, 4))]),
            r"Got 4 rows in batch\[0\] and 3 rows in batch\[2\]\[0\]",
        ),
        (np.zeros((0, 3)), r"at least one row\. Got 0 rows in batch\. Skip empty batches"),
        ([Open(None), np.zeros(0)], r"Got 0 rows in batch\[1\]\."),
        (
            [A, np.float32(1)],
            r"rows on its first axis\. Got the scalar batch\[1\]\. Give it one value",
        ),
        ([], r"at least one array\. Got none\. Pass arrays or tensors"),
        ([1, 2, 3], r"at least one array\. Got none\."),
        (None, r"at least one array\. Got none\."),
    ],
)
def test_batches_without_common_rows_are_refused(batch, text):
    with pytest.raises(ValueError, match=text):
        common_rows(array_leaves(batch))


# Window


def test_a_window_is_an_immutable_sequence_and_no_list():
    source = ["a", "b", "c"]
    window = Window(source)
    source.append("d")
    assert isinstance(window, Sequence)
    assert not isinstance(window, list | tuple)
    assert list(window) == ["a", "b", "c"]
    assert (len(window), window[0], window[-1], "b" in window) == (3, "a", "c", True)
    assert (list(reversed(window)), window.index("c"), window.count("z")) == (["c", "b", "a"], 2, 0)
    with pytest.raises(TypeError):
        window[0] = "z"
    with pytest.raises(TypeError):
        del window[0]
    with pytest.raises(AttributeError):
        window.append("z")
    with pytest.raises(AttributeError):
        window.other = 1
    with pytest.raises(IndexError):
        window[3]


def test_a_slice_of_a_window_is_a_window():
    window = Window("abcd")[1:3]
    assert isinstance(window, Window)
    assert list(window) == ["b", "c"]


def test_a_window_says_what_it_is():
    assert repr(Window("abc")) == "Window of 3 micro-batches"


def test_a_window_takes_any_iterable_once():
    assert list(Window(iter("ab"))) == ["a", "b"]
    assert list(Window(Window("ab"))) == ["a", "b"]


@given(st.lists(st.integers()))
def test_a_window_survives_the_nest_protocol_copies_and_pickles(items):
    window = Window(items)
    metadata, components = window.__tf_flatten__()
    for twin in (
        Window.__tf_unflatten__(metadata, components),
        copy.copy(window),
        copy.deepcopy(window),
        pickle.loads(pickle.dumps(window)),
    ):
        assert isinstance(twin, Window)
        assert list(twin) == items


def test_windows_of_one_form_have_equal_metadata():
    # Otherwise tf.function would trace again for each of them.
    assert Window("ab").__tf_flatten__()[0] == Window("cd").__tf_flatten__()[0]


def test_an_empty_window_is_refused():
    check_window(Window("a"))
    with pytest.raises(
        ValueError, match=r"at least one micro-batch\. Got an empty Window\. Skip empty windows"
    ):
        check_window(Window([]))


# windows


@given(st.lists(st.integers(), min_size=1, max_size=60), st.integers(1, 70))
def test_windows_drop_nothing_and_only_the_last_is_short(stream, steps):
    found = list(windows(stream, accumulation_steps=steps))
    assert all(isinstance(window, Window) for window in found)
    assert [item for window in found for item in window] == stream
    assert all(len(window) == steps for window in found[:-1])
    assert 1 <= len(found[-1]) <= steps


def test_windows_read_no_further_than_needed():
    stream = itertools.count()
    first = next(iter(windows(stream, accumulation_steps=3)))
    assert list(first) == [0, 1, 2]
    assert next(stream) == 3


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, "4", None])
def test_windows_refuse_a_bad_size_at_the_call(steps):
    stream = iter("abc")
    with pytest.raises(ValueError, match=r"accumulation_steps"):
        windows(stream, accumulation_steps=steps)
    assert next(stream) == "a"


def test_an_empty_stream_is_refused_at_the_first_window():
    found = windows([], accumulation_steps=2)
    with pytest.raises(
        ValueError,
        match=r"at least one micro-batch\. Got an empty stream\. A generator can be read",
    ):
        next(iter(found))


def test_windows_are_read_anew_for_every_epoch():
    found = windows(["a", "b", "c"], 2)
    assert [[len(window) for window in found] for _ in range(3)] == [[2, 1]] * 3
    assert len(found) == 2
    assert repr(found) == "Windows of 2 micro-batches each"


def test_windows_of_a_stream_without_a_length_have_none():
    found = windows(iter("abc"), 2)
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        len(found)
    assert len(list(found)) == 2


def test_what_is_no_stream_is_refused_at_the_call():
    with pytest.raises(TypeError, match=r"an iterable of micro-batches\. Got int\. Pass a loader"):
        windows(3, 2)


def test_a_generator_that_was_read_is_not_an_empty_epoch():
    stream = windows(iter("abcd"), accumulation_steps=2)
    assert len(list(stream)) == 2
    with pytest.raises(ValueError, match=r"Got an empty stream"):
        list(stream)


def test_a_fault_of_the_stream_is_passed_on():
    def stream():
        yield "a"
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        next(iter(windows(stream(), accumulation_steps=2)))
