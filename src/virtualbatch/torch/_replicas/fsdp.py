"""Fully sharded modules, refused until they are built."""

from typing import Any

from virtualbatch.torch._modules import Inventory
from virtualbatch.torch._replicas.replicas import Replicas


def Sharded(found: Inventory, group: Any, reduce: str | None) -> Replicas:
    raise NotImplementedError
