"""How a leaf of aux is put together, and what is remembered of it."""

import gc

import pytest

from virtualbatch.window.aux import AuxLeaf, AuxShapes, kinds, kinds_without_rows, summed_dtype

NOTHING = AuxLeaf((), "NoneType")


def judged(column, rows, other=99, at_other=None):
    """The kind of a single leaf."""
    auxes = [[leaf] for leaf in column]
    (kind,) = kinds(
        [0] * len(auxes), auxes, rows, other, at_other or (lambda: pytest.fail("asked"))
    )
    return kind


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        (AuxLeaf((), "float32"), "mean"),
        (AuxLeaf((3,), "bfloat16"), "mean"),
        (AuxLeaf((), "complex"), "mean"),
        (AuxLeaf((), "int"), "sum"),
        (AuxLeaf((3,), "uint8"), "sum"),
        (NOTHING, "nothing"),
    ],
)
def test_kinds(leaf, kind):
    assert judged([leaf, leaf], [4, 2]) == kind


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        *((dtype, "int32") for dtype in ("int4", "int8", "uint8", "int16", "uint16", "int32")),
        *((dtype, dtype) for dtype in ("uint32", "int64", "int", "float16")),
    ],
)
def test_integers_are_summed_in_32_bits_at_least(dtype, wide):
    assert summed_dtype(dtype) == wide


def test_entries_per_row_are_told_by_two_numbers_of_rows():
    assert judged([AuxLeaf((4,), "bool"), AuxLeaf((2,), "bool")], [4, 2]) == "rows"
    assert judged([AuxLeaf((4,), "int8"), AuxLeaf((4,), "int8")], [4, 2]) == "sum"


@pytest.mark.parametrize("rows", [4, None])
@pytest.mark.parametrize(("length", "kind"), [(5, "rows"), (4, "mean")])
def test_equal_micro_batches_are_asked_at_another_number_of_rows(rows, length, kind):
    leaf = AuxLeaf((rows,), "float32")
    asked = lambda: [AuxLeaf((length,), "float32")]  # noqa: E731
    assert judged([leaf, leaf], [rows, rows], 5, asked) == kind


def test_without_rows_whatever_has_an_axis_is_concatenated():
    # Whether lengths happen to be equal must not decide it.
    for second in (4, 2):
        first = [AuxLeaf((4,), "float32"), AuxLeaf((), "float32"), AuxLeaf((), "int"), NOTHING]
        auxes = [first, [AuxLeaf((second,), "float32"), *first[1:]]]
        assert kinds_without_rows([0, 0], auxes) == ["rows", "mean", "sum", "nothing"]
    with pytest.raises(ValueError, match="aux must have the same structure"):
        kinds_without_rows([0, 1], [[NOTHING], [NOTHING]])


@pytest.mark.parametrize("dtype", ["bool", "string", "str", "object", "key<fry>"])
def test_what_can_be_neither_summed_nor_averaged_is_refused(dtype):
    with pytest.raises(TypeError, match=rf"one entry per row, or be a number.*Got {dtype}\. Cast"):
        judged([AuxLeaf((), dtype)] * 2, [4, 2])


@pytest.mark.parametrize(
    "column", [[NOTHING, AuxLeaf((), "int")], [AuxLeaf((), "int"), AuxLeaf((), "float")]]
)
def test_a_leaf_that_changes_its_kind_is_refused(column):
    with pytest.raises(ValueError, match="aux must have the same structure"):
        judged(column, [4, 2])


def test_a_structure_that_changes_is_refused():
    with pytest.raises(ValueError, match="aux must have the same structure"):
        kinds(["a", "b"], [[NOTHING], [NOTHING]], [4, 2], 5, list)
    leaf = AuxLeaf((4,), "int8")
    with pytest.raises(ValueError, match="aux must have the same structure"):
        judged([leaf, leaf], [4, 4], 5, list)


def test_answers_are_kept_as_long_as_the_function_lives():
    shapes = AuxShapes()

    class Owner:
        def one(self):
            pass

        def other(self):
            pass

    def function():
        pass

    owner, answers = Owner(), iter(range(9))
    ask = lambda fn, key: shapes.of(fn, key, lambda: next(answers))  # noqa: E731
    found = [ask(fn, key) for fn in (function, owner.one, owner.other) for key in "ab"]
    assert found == [0, 1, 2, 3, 4, 5]
    assert [ask(fn, key) for fn in (function, owner.one, owner.other) for key in "ab"] == found
    assert len(shapes._found) == 2
    del function, owner
    gc.collect()
    assert len(shapes._found) == 0


def test_rows_on_another_axis_than_the_first_are_refused():
    text = r"must have its rows on the first axis\. Got shape \(2, 4, 3\) with the rows on axis 1\."
    hidden, smaller = AuxLeaf((2,), "float32", (4, 3)), AuxLeaf((2,), "float32", (2, 3))
    with pytest.raises(ValueError, match=text):
        judged([hidden, smaller], [4, 2])
    # Where all micro-batches are alike another number of rows tells.
    with pytest.raises(ValueError, match=text):
        kinds(["s"] * 2, [[hidden]] * 2, [4, 4], 5, lambda: [AuxLeaf((2,), "float32", (5, 3))])
    assert kinds(["s"] * 2, [[hidden]] * 2, [4, 4], 5, lambda: [hidden]) == ["mean"]
    # A square per row has its rows first.
    square = AuxLeaf((4,), "float32", (4,))
    assert kinds(["s"] * 2, [[square]] * 2, [4, 4], 5, lambda: [square._replace(length=(5,))]) == [
        "rows"
    ]
