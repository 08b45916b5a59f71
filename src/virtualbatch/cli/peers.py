"""`virtualbatch bench --peers list`: the peers of each engine, and which are not installed."""

import importlib.metadata

from rich.console import Group, RenderableType
from rich.table import Table

from virtualbatch.bench.peers import Peer, peers_of, pip_install
from virtualbatch.bench.settings import Settings, missing
from virtualbatch.bench.table import headed
from virtualbatch.cli.trainers import is_within


def listing(settings: Settings) -> Group:
    """The peers of the chosen engines and models."""
    parts: list[RenderableType] = []
    for engine in settings.chosen_engines:
        parts += [_of_engine(engine, settings), ""]
    parts += [
        f"{engine}: not installed: {pip_install(*missing(engine))}"
        for engine in settings.absent_engines
    ]
    return Group(*parts)


def _of_engine(engine: str, settings: Settings) -> Table:
    table = headed(engine)
    table.add_column("peer")
    table.add_column("installed")
    for peer in peers_of(engine, settings.chosen_models):
        table.add_row(peer.name, installed(peer))
    return table


def installed(peer: Peer) -> str:
    """The package of a peer with its version, or how to install it."""
    name, sign, bound = peer.package.partition(">=")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"no: {pip_install(peer.package)}"
    if not is_within(version, sign + bound):
        return f"no, {name} {version}: {pip_install(peer.package)}"
    return f"{name} {version}"
