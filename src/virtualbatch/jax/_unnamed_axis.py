"""Logs the cost if rows are spread over devices and `axis_name` is not given.

On a mesh with explicit axes, types show that rows are spread. With automatic axes, nothing shows it
before the program is compiled. A program that asks the compiler
(`jax.debug.inspect_array_sharding`) can be neither cached nor exported. So for automatic axes only
the mesh in use is checked.
"""

import logging
import math
from typing import Any
from weakref import WeakKeyDictionary

import jax
from jax.sharding import AxisType

from virtualbatch.jax._arrays import is_array
from virtualbatch.window.fingerprint import owner_of

_log = logging.getLogger("virtualbatch")

# Owner of a loss -> the texts that were logged for the loss.
_TOLD: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def tell_once(fun: Any, batch: Any) -> None:
    """Logs, once for each loss, that devices do more work than needed.

    Args:
        fun: the loss.
        batch: a batch that is cut inside a program into several micro-batches.
    """
    owner = owner_of(fun)
    text = _explicit(batch) or _automatic()
    if text is not None and text not in _TOLD.setdefault(owner, set()):
        _TOLD[owner].add(text)
        _log.warning("%s See docs/guides/devices.md.", text)


def _explicit(batch: Any) -> str | None:
    for leaf in filter(is_array, jax.tree.leaves(batch)):
        sharding = jax.typeof(leaf).sharding
        entry = sharding.spec[0] if sharding.spec else None
        names = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        devices = math.prod(sharding.mesh.shape[name] for name in names)
        if devices > 1:
            axis = names[0] if len(names) == 1 else names
            return (
                f"The rows of this batch are spread over {devices} devices, whose gradients are "
                f"summed in every micro-batch. Pass axis_name={axis!r} to sum them once per window."
            )
    return None


def _automatic() -> str | None:
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    names = [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]
    # Inside `shard_map` the user says which device has which rows.
    if not names or mesh.manual_axes:
        return None
    return (
        "jit cannot see whether the rows of this batch are spread over automatic axes of the mesh "
        f"in use ({', '.join(names)}). If they are, every device computes all rows: the result is "
        f'right, but no faster. Pass axis_name="{names[0]}", or whichever axis has the rows.'
    )
