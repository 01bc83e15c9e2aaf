"""Bytes by name in a folder or a bucket: whole writes, create-only writes, compare-and-swap.

Names are relative, with `/` between parts. A reader never sees half of a write: a folder gets a temporary file, flushed
to the disk, then a link (create-only) or a rename; one PUT to a bucket is whole by itself.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import StageFailed, UsageError


@contextmanager
def full_disk(place: str) -> Iterator[None]:
    """Turn a full disk into StageFailed."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        reason = f"disk full at {place}: free some space and run again; what is done is kept"
        raise StageFailed(reason) from error


@contextmanager
def writing(place: str) -> Iterator[None]:
    """Turn a full disk into StageFailed, and a place that refuses to be written to into UsageError."""
    try:
        with full_disk(place):
            yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        reason = f"Cannot write to {place} ({error.strerror}); set THERMOFUSE_STORE to a folder that you own."
        raise UsageError(reason) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file outside the store, whole or not at all, and make its folder.

    Raises StageFailed when the disk is full, UsageError when the place may not be written to.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with full_disk(str(path.parent)):
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
    except OSError as error:
        raise UsageError(f"Cannot write {path} ({error.strerror}); name a folder that you own.") from error
    finally:
        with suppress(OSError):
            part.unlink()


class Folder:
    """Bytes in a local folder, or in one that every node mounts."""

    def __init__(self, root: str):
        self.root = Path(root).expanduser().absolute()

    def path(self, name: str) -> Path:
        return self.root / name

    def exists(self, name: str) -> bool:
        return self.path(name).is_file()

    def names(self, prefix: str) -> list[str]:
        """Every name below the folder `prefix`, sorted."""
        return sorted(p.relative_to(self.root).as_posix() for p in self.path(prefix).rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_many(self, names: list[str]) -> list[bytes]:
        return [self.read(name) for name in names]

    def write(self, name: str, data: bytes) -> None:
        with self._whole(name, data) as temporary:
            os.replace(temporary, self.path(name))

    def create(self, name: str, data: bytes) -> str | None:
        """Write `name` unless it is there; its tag, or None when it was. Of any number of writers exactly one wins."""
        with self._whole(name, data) as temporary:
            try:
                os.link(temporary, self.path(name))
            except FileExistsError:
                return None
        return _tag(data)

    def tagged(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of `name` and the tag that `swap` wants back; None when there is no such name."""
        try:
            data = self.read(name)
        except FileNotFoundError:
            return None
        return data, _tag(data)

    def swap(self, name: str, data: bytes, tag: str) -> str | None:
        """Replace `name` if it still holds what `tag` stands for; the new tag, or None when it does not."""
        with self._guard(name):
            now = self.tagged(name)
            if now is None or now[1] != tag:
                return None
            self.write(name, data)
        return _tag(data)

    @contextmanager
    def _whole(self, name: str, data: bytes) -> Iterator[Path]:
        temporary = self.root / ".tmp" / uuid.uuid4().hex
        with writing(str(self.root)):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            self.path(name).parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                yield temporary
            finally:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        """One process at a time per name; the kernel frees it when the process dies."""
        guard = self.root / ".tmp" / (f"{_tag(name.encode())}.guard")
        with writing(str(self.root)):
            guard.parent.mkdir(parents=True, exist_ok=True)
            with open(guard, "w") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
