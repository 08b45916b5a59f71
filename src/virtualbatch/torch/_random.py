"""The state of PyTorch's random generators, so that a window can be run again."""

from typing import Any

import torch


class RandomState:
    """The default generators of the host and of one device, as they are now.

    Args:
        device: a device other than the host on which a window draws random numbers, or None.
    """

    def __init__(self, device: torch.device | None):
        self._host = torch.get_rng_state()
        # Meta tensors hold nothing, and nothing is drawn for them.
        drawn = device is not None and device.type != "meta"
        self._module: Any = torch.get_device_module(device) if drawn else None
        # There is only one MPS device, and its functions take no device.
        self._place = () if device is None or device.type == "mps" else (device,)
        self._on_device = self._module and self._module.get_rng_state(*self._place)

    def has_moved(self) -> bool:
        """Whether random numbers were drawn since this object was made."""
        moved = not torch.equal(self._host, torch.get_rng_state())
        if self._module is None:
            return moved
        return moved or not torch.equal(self._on_device, self._module.get_rng_state(*self._place))

    def restore(self) -> None:
        """Sets the generators back to the state that they had when this object was made."""
        torch.set_rng_state(self._host)
        if self._module is not None:
            self._module.set_rng_state(self._on_device, *self._place)
