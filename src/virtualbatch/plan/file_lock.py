"""A lock on a file, for threads and for processes."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Seconds. The holder of the lock only reads and writes one small file.
PATIENCE = 10.0
_PAUSE = 0.002


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Holds a lock, so that no other thread or process can hold it at the same time.

    The lock is a second file next to `file`, because `file` itself may be replaced. It is removed
    afterwards. There is no locking on Windows and on file systems without locks.

    Args:
        file: the file to lock.

    Raises:
        OSError: the lock cannot be made, or others hold it for too long.
    """
    if sys.platform == "win32":
        yield
        return
    lock = file.with_name(f".{file.name}.lock")
    handle = _taken(lock, time.monotonic() + PATIENCE)
    try:
        yield
    finally:
        # Remove it while it is held. A waiting process then sees that the name belongs to no file,
        # or to another one. A lock file that stays does no harm.
        with suppress(OSError):
            lock.unlink()
        _give_back(handle)


if sys.platform != "win32":

    def _taken(lock: Path, until: float) -> int:
        while True:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            if _is_free(handle) and _is_named(handle, lock):
                return handle
            _give_back(handle)
            if time.monotonic() > until:
                raise TimeoutError(errno.ETIMEDOUT, "its lock is held by others", str(lock))
            time.sleep(_PAUSE)

    def _is_free(handle: int) -> bool:
        """Takes the lock and returns True if it was free or the file system has no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _is_named(handle: int, lock: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(lock, follow_symlinks=False))
        except FileNotFoundError:
            return False

    def _give_back(handle: int) -> None:
        # Closing is not enough if the process was forked meanwhile. Unlocking fails on file systems
        # without locks, where there is nothing to release.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
