"""`virtualbatch bench --peers list`: everybody who takes part is named, with what is missing."""

import importlib.metadata

import pytest
from tests.tiers import tiered
from typer.testing import CliRunner

from virtualbatch.bench.case import ENGINES, MODELS
from virtualbatch.bench.children import result_of
from virtualbatch.bench.peers import Peer, peers_of, pip_install
from virtualbatch.cli import app as cli
from virtualbatch.cli.peers import installed

# Names the peers of an engine, and the packages of those that are not there.
CONTENDERS = """
import sys
from virtualbatch.bench.case import MODELS, Case
from virtualbatch.bench.child import entries
from virtualbatch.bench.children import tell
from virtualbatch.bench.contender import PEER, Absent
tell([
    [[entry.name, entry.package if isinstance(entry, Absent) else None]
     for entry in entries(Case(sys.argv[1], model), "all")
     if isinstance(entry, Absent) or entry.role == PEER]
    for model in MODELS
])
"""


@pytest.mark.parametrize(
    "engine", tiered(ENGINES, ["jax"], "each starts a framework and builds every model")
)
def test_those_named_are_those_who_take_part(engine):
    backend = {"KERAS_BACKEND": engine.removeprefix("keras-")}
    found = result_of("The contenders", ["-c", CONTENDERS, engine], 300, backend)
    for model, contenders in zip(MODELS, found, strict=True):
        listed = {peer.name: peer.package for peer in peers_of(engine, [model])}
        assert sorted(name for name, _ in contenders) == sorted(listed)
        for name, package in contenders:
            assert package in (None, listed[name])


def test_the_list_measures_nothing(monkeypatch):
    monkeypatch.setattr(cli, "run_bench", lambda *_: pytest.fail("it was measured"))
    arguments = ["bench", "--peers", "list", "--engine", "torch", "--model", "MLP"]
    outcome = CliRunner().invoke(cli.app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert f"torch {importlib.metadata.version('torch')}" in outcome.output
    assert all(peer.name in outcome.output for peer in peers_of("torch", ["MLP"]))
    assert "cached gradients by hand" not in outcome.output


def test_what_is_not_installed_says_how_to_install_it(monkeypatch):
    def version(name):
        if name == "optax":
            return "0.2.5"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert installed(Peer("a", "optax")) == "optax 0.2.5"
    assert installed(Peer("a", "optax>=0.2.8")) == 'no, optax 0.2.5: pip install "optax>=0.2.8"'
    assert installed(Peer("a", "lightning")) == "no: pip install lightning"


def test_an_engine_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optax" else name)
    outcome = CliRunner().invoke(cli.app, ["bench", "--peers", "list"])
    assert outcome.exit_code == 0, outcome.output
    assert "jax: not installed: pip install optax\n" in outcome.output
    assert "optax.MultiSteps" not in outcome.output


def test_a_bound_is_quoted_for_the_shell():
    assert pip_install("jax", "optax>=0.2.8") == 'pip install jax "optax>=0.2.8"'
