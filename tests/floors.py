"""The lowest releases that pyproject.toml allows, as constraints for `pip`; see `make test-floors`.

    python tests/floors.py > build/floors.txt

What has no floor is installed as constraints.txt has it.
"""

import re
import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Released with another package, whose floor decides.
_FOLLOWS = {"jaxlib": "jax"}


def floors():
    """Name of a package -> the lowest release that its extra allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    found = (re.match(r"([\w-]+)>=([\d.]+)", requirement) for requirement in wanted)
    return {match[1]: match[2] for match in found if match}


def pins():
    """Name of a package -> the release that development and the other tests use."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def constraints():
    """Lines of a constraints file: floors, and pins of what has none."""
    lowest = floors()
    kept = {
        name: release for name, release in pins().items() if _FOLLOWS.get(name, name) not in lowest
    }
    return [f"{name}=={release}" for name, release in (kept | lowest).items()]


if __name__ == "__main__":
    print("\n".join(constraints()))
