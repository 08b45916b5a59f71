"""An undo log: what a call has changed is put back, wherever the call is interrupted.

A signal handler, such as that of Ctrl-C, may raise between any two instructions: at the first line
of a `finally`, inside the `__exit__` of a context, or after a hook was registered and before its
handle was kept. So code that changes something first logs how to put it back, and does not rely on
its `finally` alone. Holding signals back would not be enough: handlers can be set only in the main
thread, and a long forward pass there would not react to Ctrl-C.
"""

import functools
import threading
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

from virtualbatch.torch._modes import Modes

Given = ParamSpec("Given")
Result = TypeVar("Result")


class _Log(threading.local):
    """The pending undos of this thread, the latest last."""

    def __init__(self) -> None:
        self.entries: list[Undo] = []


class Undo:
    """A context that undoes a change once, when it ends.

    If an interrupt cuts the end of the context, the call around it (`all_or_nothing`) undoes the
    change. Enter the context before the change.

    Args:
        action: undoes the change. It is called again if an interrupt cuts it, so it must give the
            same result wherever it was cut. None if there is nothing to undo yet: see `instead`.
    """

    def __init__(self, action: Callable[[], object] | None = None):
        self._action = action

    @property
    def action(self) -> Callable[[], object]:
        """The action that is still to be done."""
        return self._action or _nothing

    def instead(self, action: Callable[[], object] | None) -> None:
        """Replaces the action, such as by one that finishes a change instead of undoing it.

        Args:
            action: the new action, as for `Undo`; None for nothing.
        """
        self._action = action

    def do(self) -> None:
        """Runs the action, if it is still to be done."""
        if self._action is not None:
            self._action()
            # A generator that was cut may be closed much later. It must not undo again then.
            self._action = None

    def __enter__(self) -> "Undo":
        _LOG.entries.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entries = _LOG.entries
        if self in entries:
            # Contexts that were entered later, and whose end was cut, are undone first.
            _settle(entries, entries.index(self))


def _nothing() -> None:
    """The action if there is nothing to undo."""


_LOG = _Log()


def all_or_nothing(run: Callable[[], Result]) -> Result:
    """Runs a function. If it raises, every change that it logged is undone.

    Args:
        run: called once.

    Returns:
        The result of `run`.
    """
    entries = _LOG.entries
    start = len(entries)
    modes = Modes(is_outermost=not start)
    # One interrupt may follow an error, and another one may follow that. Each level handles one.
    try:
        try:
            try:
                found = run()
                if len(entries) > start:
                    # An interrupt cut the end of a context, but the code caught it and went on.
                    _settle(entries, start)
                return found
            except BaseException:
                modes.restore()
                _settle(entries, start)
                raise
        except BaseException:
            modes.restore()
            _settle(entries, start)
            raise
    except BaseException:
        modes.restore()
        _settle_each(entries, start)
        raise


def undone_if_cut(fn: Callable[Given, Result]) -> Callable[Given, Result]:
    """A function that runs `fn` inside `all_or_nothing`.

    Args:
        fn: logs every change that it makes.
    """

    @functools.wraps(fn)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return all_or_nothing(functools.partial(fn, *args, **kwargs))

    return called


def _settle(entries: list[Undo], start: int) -> None:
    while len(entries) > start:
        # Done before it is removed: if an interrupt cuts it, it is done again.
        entries[-1].do()
        entries.pop()


def _settle_each(entries: list[Undo], start: int) -> None:
    """Undoes the entries. If one of them fails, all others are still undone."""
    while len(entries) > start:
        try:
            entries.pop().do()
        finally:
            _settle_each(entries, start)
