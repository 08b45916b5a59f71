"""Plans in a file that several threads and processes may share."""

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
        file: its path. The first plan creates the file; its folder must exist.

    Attributes:
        plans: the plans in the file when it was opened.

    Raises:
        ValueError: the file holds anything but plans, or cannot be read.
        TypeError: `file` is not a path.
    """

    def __init__(self, file: str | os.PathLike[str]):
        if not isinstance(file, str | os.PathLike):
            raise TypeError(
                f"file must be the name of a file, or None. Got {type(file).__name__}. "
                "Pass for example file='plans.json'."
            )
        self._file = Path(file)
        # Plans that are not written yet.
        self._waiting: dict[Signature, Plan] = {}
        self._has_warned = False
        self._check()
        self.plans = self._read()

    def __str__(self) -> str:
        return str(self._file)

    def add(self, signature: Signature, plan: Plan) -> None:
        """Adds a plan to the file; it replaces the plans that it covers.

        If the file cannot be written, the plan is kept for the next attempt and a warning is logged
        once.

        Args:
            signature: the signature of the batch of the plan.
            plan: the plan to add.
        """
        self._waiting[signature] = plan
        waiting = list(self._waiting.items())
        try:
            with locked(Path(os.path.realpath(self._file))):
                found = self._read()
                for entry in waiting:
                    found = _with(found, entry)
                write_whole(self._file, as_text(found))
        # A ValueError means that the file now holds something else. It must not be overwritten.
        except (OSError, ValueError) as error:
            self._warn(error)
            return
        for written, _ in waiting:
            self._waiting.pop(written, None)

    def _check(self) -> None:
        """Raises a ValueError if the path is not a file and cannot become one."""
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
                f"{error}. Remove the file, or pass another name."
            ) from error

    def _unreadable(self, error: Exception) -> ValueError:
        why = error.strerror if isinstance(error, OSError) else error
        return ValueError(
            f"file must be readable. Got {str(self._file)!r} ({why}). Pass another name."
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
    """Adds a plan and drops the plans that it covers. If another plan covers it, adds nothing."""
    others = [entry for entry in entries if not new[0].covers(entry[0])]
    return others if any(entry[0].covers(new[0]) for entry in others) else [*others, new]
