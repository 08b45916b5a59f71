"""Files that are written whole: beside their place first, and moved there in one go."""

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write_whole(file: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file. Whatever goes wrong, what stood there before still stands there, whole.

    Mode, owner and group of what stood there are kept, as far as this user may set them. Where the
    name is a link, what it points to is written. A device or a pipe is written as it is.

    Args:
        file: its name.
        content: a text, written as UTF-8, or bytes.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    before = _standing(file)
    if before is not None and not stat.S_ISREG(before.st_mode):
        Path(file).write_bytes(data)
        return
    # The link stays, and what it points to is replaced.
    place = Path(os.path.realpath(file))
    with _aside(place, before) as (stream, aside):
        stream.write(data)
        stream.flush()
        # Some file systems say only now that they are full.
        os.fsync(stream.fileno())
        if before is not None:
            _dress_like(aside, before)
        os.replace(aside, place)


def check_writable(file: str | os.PathLike[str]) -> None:
    """Finds out whether `write_whole` could write a file. Nothing is changed.

    Args:
        file: its name.

    Raises:
        OSError: it cannot be written.
    """
    before = _standing(file)
    if before is None or stat.S_ISREG(before.st_mode):
        with _aside(Path(os.path.realpath(file)), before):
            return
    if stat.S_ISDIR(before.st_mode):
        raise _refused(errno.EISDIR, file)
    if not os.access(file, os.W_OK):
        raise _refused(errno.EACCES, file)


def _standing(file: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return os.stat(file)
    except FileNotFoundError:
        return None


@contextmanager
def _aside(place: Path, before: os.stat_result | None) -> Iterator[tuple[BinaryIO, Path]]:
    """A new file beside a place, which is gone afterwards unless it was moved."""
    if before is not None and not os.access(place, os.W_OK):
        # A folder that may be written would let us replace what may not be.
        raise _refused(errno.EACCES, place)
    # No part of the file's own name, which may be as long as a name can be.
    aside = place.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(aside, "xb") as stream:
            yield stream, aside
    finally:
        aside.unlink(missing_ok=True)


def _dress_like(file: Path, before: os.stat_result) -> None:
    if hasattr(os, "chown"):
        for owner, group in ((-1, before.st_gid), (before.st_uid, -1)):
            with suppress(PermissionError):
                os.chown(file, owner, group)
    # Last, because a new owner takes bits away.
    os.chmod(file, stat.S_IMODE(before.st_mode))


def _refused(number: int, file: str | os.PathLike[str]) -> OSError:
    return OSError(number, os.strerror(number), os.fspath(file))
