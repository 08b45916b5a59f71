"""Plans that are kept in a file, which several threads and processes may share."""

import logging
import os
import stat
from pathlib import Path

from virtualbatch.atomic_write import write_whole
from virtualbatch.plan.file_lock import locked
from virtualbatch.plan.plan import Plan
from virtualbatch.plan.plan_format import Entry, as_text, entries_in
from virtualbatch.plan.signature import Signature

_log = logging.getLogger("virtualbatch")


class PlanFile:
    """A file of plans.

    Args:
        file: its name. It is made with the first plan; its folder exists.

    Attributes:
        plans: those that it held.

    Raises:
        ValueError: it holds something else, or cannot be read.
        TypeError: the name is no name.
    """

    def __init__(self, file: str | os.PathLike[str]):
        if not isinstance(file, str | os.PathLike):
            raise TypeError(
                f"file must be the name of a file, or None. Got {type(file).__name__}. "
                "Pass for example file='plans.json'."
            )
        self._file = Path(file)
        # Those that could not be written yet.
        self._waiting: dict[Signature, Plan] = {}
        self._has_warned = False
        self._check()
        self.plans = self._read()

    def __str__(self) -> str:
        return str(self._file)

    def add(self, signature: Signature, plan: Plan) -> None:
        """Adds a plan to those that the file holds by now, in place of those that it covers.

        What cannot be written is kept for the next time, and one line of the log says so.

        Args:
            signature: what it is for.
            plan: the plan.
        """
        self._waiting[signature] = plan
        waiting = list(self._waiting.items())
        try:
            with locked(Path(os.path.realpath(self._file))):
                found = self._read()
                for entry in waiting:
                    found = _with(found, entry)
                write_whole(self._file, as_text(found))
        # A ValueError: it has become something else, which is not ours to replace.
        except (OSError, ValueError) as error:
            self._warn(error)
            return
        for written, _ in waiting:
            self._waiting.pop(written, None)

    def _check(self) -> None:
        """Refuses what is no file, or could not be one."""
        try:
            mode = os.stat(self._file).st_mode
        except FileNotFoundError:
            folder = Path(os.path.realpath(self._file)).parent
            if not folder.is_dir():
                raise ValueError(
                    "file must name a file in a folder that exists. "
                    f"Got {str(self._file)!r}. Make the folder {str(folder)!r}."
                ) from None
            return
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from error
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
            raise ValueError(
                f"file must name a file. Got {str(self._file)!r}, {kind}. "
                "Pass for example 'plans.json'."
            )

    def _read(self) -> list[Entry]:
        try:
            content = self._file.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            return entries_in(content)
        except ValueError as error:
            raise ValueError(
                f"file must hold plans that Auto has written. Got {str(self._file)!r}, in which "
                f"{error}. Remove it, or pass another name."
            ) from error

    def _unreadable(self, error: Exception) -> ValueError:
        why = error.strerror if isinstance(error, OSError) else error
        return ValueError(
            f"file must be one that can be read. Got {str(self._file)!r} ({why}). "
            "Pass another name."
        )

    def _warn(self, error: Exception) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        why = error.strerror if isinstance(error, OSError) else error
        _log.warning(
            "Plans are kept in memory only, because %s could not be written: %s", self._file, why
        )


def _with(entries: list[Entry], new: Entry) -> list[Entry]:
    """Plans and a new one. Those that it covers are left out; it is, if another covers more."""
    others = [entry for entry in entries if not new[0].covers(entry[0])]
    return others if any(entry[0].covers(new[0]) for entry in others) else [*others, new]
