"""The installed trainers, and whether virtualbatch was tried with their releases."""

import importlib.metadata
import re
from dataclasses import dataclass

# Trainer -> the module or function for it. The first two have extras that bound the releases.
_SERVED_BY = {
    "transformers": "virtualbatch.transformers",
    "lightning": "virtualbatch.lightning",
    "trl": "virtualbatch.transformers",
    "accelerate": "virtualbatch.torch.loss",
}
_BOUND = re.compile(r"(>=|<)\s*([\d.]+)")


@dataclass(frozen=True)
class Trainer:
    """The installation of one trainer.

    Args:
        name: the name of its distribution.
        version: the installed version; None if it is not installed.
        served_by: the module or function for it.
        releases: the releases that were tried, from the extras of virtualbatch; "" if the extras
            set no bounds.
        is_served: whether the installed release was tried; None if it is not installed.
    """

    name: str
    version: str | None
    served_by: str
    releases: str
    is_served: bool | None

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.name:<14}no"
        tried = "" if self.is_served else f"; not tried: {self.releases} is"
        return f"{self.name:<14}{self.version}, {self.served_by}{tried}"


def installed_trainers() -> tuple[Trainer, ...]:
    """All known trainers, installed or not. None of them is imported."""
    releases = _releases()
    return tuple(_trainer(name, releases.get(name, "")) for name in _SERVED_BY)


def is_within(version: str, releases: str) -> bool:
    """Whether a version is within bounds.

    Args:
        version: a version such as "5.24.0".
        releases: bounds such as ">=5.24,<6"; "" for no bounds.
    """
    number = _number(version)
    return all(
        number >= _number(bound) if kind == ">=" else number < _number(bound)
        for kind, bound in _BOUND.findall(releases)
    )


def _trainer(name: str, releases: str) -> Trainer:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Trainer(name, None, _SERVED_BY[name], releases, None)
    return Trainer(name, version, _SERVED_BY[name], releases, is_within(version, releases))


def _releases() -> dict[str, str]:
    """Distribution -> its bounds in the extras of this package."""
    found = {}
    for requirement in importlib.metadata.requires("virtualbatch") or ():
        match = re.match(r"([\w-]+)([^;]*)", requirement)
        if match and _BOUND.search(match[2]):
            bounds = sorted((f"{kind}{bound}" for kind, bound in _BOUND.findall(match[2])))
            found[match[1]] = ",".join(reversed(bounds))
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
