"""An undo log: what a call has changed is put back, whatever interrupts it, at whatever line.

The handler of a signal, such as that of Ctrl-C, may raise between any two instructions: at the
first line of a `finally`, inside the `__exit__` of a context, after a hook was registered and
before its handle was kept. So code that changes something first logs how to put it back, and does
not rely on its `finally` alone. Holding signals back would not be enough: handlers can be set in
the main thread only, and a long forward pass there would not react to Ctrl-C.
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
    """The undos that are to be done in this thread, the latest last."""

    def __init__(self) -> None:
        self.entries: list[Undo] = []


class Undo:
    """A context at whose end something is put back, once; or at that of the call around it.

    Enter it before the change.

    Args:
        action: puts it back. It is called again if an interrupt cuts it, so it must give the same
            result wherever it was cut. None where there is nothing yet, see `instead`.
    """

    def __init__(self, action: Callable[[], object] | None = None):
        self._action = action

    @property
    def action(self) -> Callable[[], object]:
        """What is still to be done."""
        return self._action or _nothing

    def instead(self, action: Callable[[], object] | None) -> None:
        """Does something else from now on, such as to finish what has been begun.

        Args:
            action: see `Undo`; None for nothing.
        """
        self._action = action

    def do(self) -> None:
        """Puts it back, if that is still to be done."""
        if self._action is not None:
            self._action()
            # A generator that was cut may be closed much later, and must not put back then.
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
            # What was entered later, and cut on its way out, goes first.
            _settle(entries, entries.index(self))


def _nothing() -> None:
    """There is nothing to put back."""


_LOG = _Log()


def all_or_nothing(run: Callable[[], Result]) -> Result:
    """Runs something; if it raises, all that it has entered in the log is put back.

    Args:
        run: called once.

    Returns:
        What it returns.
    """
    entries = _LOG.entries
    start = len(entries)
    modes = Modes(is_outermost=not start)
    # An error may be followed by one interrupt, and that by another: each comes to the next level.
    try:
        try:
            try:
                found = run()
                if len(entries) > start:
                    # Of something that was cut, in code that went on nevertheless.
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
    """A function that runs by `all_or_nothing`.

    Args:
        fn: changes nothing that is not in the log.
    """

    @functools.wraps(fn)
    def called(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        return all_or_nothing(functools.partial(fn, *args, **kwargs))

    return called


def _settle(entries: list[Undo], start: int) -> None:
    while len(entries) > start:
        # Before it is taken off: cut here, it is done again.
        entries[-1].do()
        entries.pop()


def _settle_each(entries: list[Undo], start: int) -> None:
    """The same where one may have failed: all others are still undone."""
    while len(entries) > start:
        try:
            entries.pop().do()
        finally:
            _settle_each(entries, start)
