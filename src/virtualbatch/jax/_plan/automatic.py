"""The planned size of a call, and the sizes that are kept for later calls."""

from collections.abc import Callable
from typing import Any, NamedTuple

from virtualbatch.jax._plan.plan import planned
from virtualbatch.jax._plan.sizes import kept_sizes, needs_values, signature, stand_ins
from virtualbatch.plan.auto import Auto, CurrentSize
from virtualbatch.plan.plan import Plan


class Sizes(NamedTuple):
    """The sizes of the calls of a function.

    Fields:
        fun: the user's function.
        computed: the fingerprint of the function and its options.
        batch_argnum: position of the batch.
        microbatch_size: as the user gave it.
        axis_name: mesh axes over which the batch is spread, or None.
        window: microbatch_size -> the function that computes a window with it.
    """

    fun: Callable[..., Any]
    computed: str
    batch_argnum: int
    microbatch_size: Any
    axis_name: Any
    window: Callable[[int], Callable[..., Any]]

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Auto:
        """The sizes of calls like this one."""
        if isinstance(self.microbatch_size, Auto):
            return self.microbatch_size
        return kept_sizes(self.fun, self.computed, args, kwargs, self.batch_argnum)

    def planned(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CurrentSize:
        """The size that a plan finds, once for calls like this one.

        Raises:
            ValueError: a plan cannot be made inside this call, as in `shard_map` or a trace.
        """
        is_spread = self.axis_name is not None
        reason = "a call with axis_name" if is_spread else needs_values((args, kwargs))
        if reason is not None:
            raise ValueError(
                'microbatch_size="auto" plans one device outside of shard_map. '
                f"Got {reason}. Call plan with the shapes of one device, and pass what it finds."
            )

        def make() -> Plan:
            given, named = stand_ins((args, kwargs))
            batch = given[self.batch_argnum]
            return planned(self.window, batch, given, named, kept.memory_limit)

        kept = self.of(args, kwargs)
        return kept.planned(signature(self.computed, args, kwargs, self.batch_argnum), make)
