"""A lock on a file, between threads and between processes."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# Seconds. Who holds the lock reads and writes one small file.
PATIENCE = 10.0
_PAUSE = 0.002


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lets no other thread or process in that asks for the same lock.

    The lock is a file beside the one that is meant, which may be replaced. It is gone afterwards.
    Windows and file systems without locks let everyone in.

    Args:
        file: what is meant.

    Raises:
        OSError: the lock cannot be made, or others keep it for too long.
    """
    if sys.platform == "win32":
        yield
        return
    lock = file.with_name(f".{file.name}.lock")
    handle = _taken(lock, time.monotonic() + PATIENCE)
    try:
        yield
    finally:
        # While it is held: who waits for this one finds that it is no longer the one by that name.
        # One that stays does no harm.
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
                raise TimeoutError(errno.ETIMEDOUT, "others keep its lock", str(lock))
            time.sleep(_PAUSE)

    def _is_free(handle: int) -> bool:
        """Whether it was free, and is ours now; also where the file system has no locks."""
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
        # Closing alone would not do where the process was copied meanwhile. Without locks on this
        # file system there is nothing to give back.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)
