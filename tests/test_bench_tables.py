"""Tables of `virtualbatch bench` on 80 columns: nothing is cut, and names wrap at spaces."""

import io

import pytest
from rich.console import Console

from virtualbatch.bench.case import ENGINES, MODELS, Case
from virtualbatch.bench.contender import FLOOR, OURS, PEER, VIRTUALBATCH, WHOLE, WHOLE_BATCH
from virtualbatch.bench.peers import peers_of
from virtualbatch.bench.result import BenchResult, Comparison, Peak, Row
from virtualbatch.bench.sweeps import SWEEPS, peer_along
from virtualbatch.bench.table import tables

WIDTH = 80
LONGEST_FLOOR = "forward, backward in a loop, one update"
# Digits as a slow machine and a slow peer need them.
FIGURES = {"milliseconds": (9999.99,) * 3, "times_ours": (0.12, 0.13, 0.14)}
SLOWER = FIGURES | {"times_ours": (98.7, 99.9, 123.4)}


def printed(comparisons=(), sweeps=(), peaks=()):
    result = BenchResult("2 CPU cores", {}, [], comparisons, dict(sweeps), dict(peaks))
    console = Console(width=WIDTH, file=io.StringIO())
    console.print(tables(result))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= WIDTH
    # What Rich leaves out, it says so.
    assert "…" not in text
    return text.split()


def rows(*others):
    return [
        Row(VIRTUALBATCH, OURS, "right", error=1e-6, **FIGURES | {"times_ours": (1.0,) * 3}),
        Row(f"{VIRTUALBATCH} in Hugging Face Trainer", OURS, "right", error=1e-6, **FIGURES),
        Row(LONGEST_FLOOR, FLOOR, "not checked", **FIGURES),
        Row(WHOLE_BATCH, WHOLE, "right", error=0.0, **SLOWER),
        *others,
    ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_a_comparison(engine, model):
    for peer in peers_of(engine, [model]):
        for figures in (FIGURES, SLOWER):
            found = rows(
                Row(peer.name, PEER, "wrong", error=0.5, **figures),
                Row("another", PEER, "not installed", package=peer.package),
            )
            words = printed([Comparison(Case(engine, model, 128, 64, 8), found)])
            expected = [word for row in found for word in row.name.split()]
            assert set(expected) <= set(words)
            assert words.count("9999.99") == 5
            assert {"1e-06", "5e-01", "98.7-123"} <= set(words)


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_and_its_memory(name):
    for engine in ENGINES:
        case = Case(engine, "transformer", 256, 256, 4)
        peer = peer_along(engine)
        point = Comparison(case, rows(Row(peer, PEER, "right", **SLOWER)))
        peaks = [Peak(case, peer, 2**30), Peak(case, peer, None)]
        words = printed(sweeps={name: [point]}, peaks={name: peaks})
        # Of ours, the floor, the whole batch and the peer.
        assert words.count("9999.99") == 4
        assert {"65536", "152.59", "1024.0", f"{engine},", *peer.split()} <= set(words)
        # In the headings and in the columns.
        assert words.count(name) == 4


def test_each_line_of_a_sweep_has_a_table():
    cases = [Case("torch", "MLP"), Case("torch", "MLP"), Case("jax", "MLP")]
    words = printed(sweeps={"scale": [Comparison(case, rows()) for case in cases]})
    assert (words.count("torch,"), words.count("jax,")) == (1, 1)
