"""Bytes by name in an S3 bucket; the same verbs as `tasks.blobs.Folder`.

Commits and locks go through boto3 (`If-None-Match`, `If-Match`), bulk bytes through s3fs, many at a time and without a
listing cache, which would hide what others write. The address and the keys come from the AWS_* variables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from models.errors import StageFailed, UsageError

PATIENCE = {"retries": {"max_attempts": 8, "mode": "standard"}, "connect_timeout": 5}
MISSING = ("404", "NoSuchKey")
TAKEN = ("412", "PreconditionFailed")
CONFLICT = ("409", "ConditionalRequestConflict")


class Bucket:
    """Names below `s3://bucket/prefix`."""

    def __init__(self, root: str):
        self.root = root
        self.bucket, _, prefix = root.removeprefix("s3://").partition("/")
        self.prefix = f"{prefix}/" if prefix else ""

    @cached_property
    def client(self) -> Any:
        import boto3

        return boto3.client("s3", config=Config(**PATIENCE))

    @cached_property
    def files(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True, config_kwargs=PATIENCE)

    def exists(self, name: str) -> bool:
        try:
            self._call(self.client.head_object, name)
        except FileNotFoundError:
            return False
        return True

    def names(self, prefix: str) -> list[str]:
        """Every name below the folder `prefix`, sorted."""
        with self._sentences():
            found = self.files.find(self._path(prefix))
        return sorted(path.removeprefix(f"{self.bucket}/{self.prefix}") for path in found)

    def read(self, name: str) -> bytes:
        return self._call(self.client.get_object, name)["Body"].read()

    def read_many(self, names: list[str]) -> list[bytes]:
        if not names:
            return []
        with self._sentences():
            found = self.files.cat([self._path(name) for name in names])
        return [found[self._path(name)] for name in names]

    def write(self, name: str, data: bytes) -> None:
        with self._sentences():
            self.files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> str | None:
        """Write `name` unless it is there; its tag, or None when it was. Of any number of writers exactly one wins."""
        return self._put(name, data, IfNoneMatch="*")

    def tagged(self, name: str) -> tuple[bytes, str] | None:
        """The bytes of `name` and the tag that `swap` wants back; None when there is no such name."""
        try:
            found = self._call(self.client.get_object, name)
        except FileNotFoundError:
            return None
        return found["Body"].read(), found["ETag"]

    def swap(self, name: str, data: bytes, tag: str) -> str | None:
        """Replace `name` if it still holds what `tag` stands for; the new tag, or None when it does not."""
        return self._put(name, data, IfMatch=tag)

    def fetch(self, prefix: str, names: list[str], folder: Path) -> None:
        """Copy names below `prefix` to the same names below a local folder."""
        for parent in {(folder / name).parent for name in names}:
            parent.mkdir(parents=True, exist_ok=True)
        with self._sentences():
            self.files.get([self._path(f"{prefix}/{name}") for name in names], [str(folder / name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self.prefix}{name}"

    def _put(self, name: str, data: bytes, **condition: str) -> str | None:
        for attempt in range(10):
            try:
                return self._call(self.client.put_object, name, Body=data, **condition)["ETag"]
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in TAKEN:
                    return None
                if code not in CONFLICT:
                    raise
                time.sleep(0.05 * 2**attempt)  # another conditional write is on its way: see what became of it
        raise StageFailed(f"{self.root}/{name} stays busy; run again.")

    def _call(self, operation: Callable, name: str, **arguments: Any) -> dict:
        with self._sentences():
            return operation(Bucket=self.bucket, Key=f"{self.prefix}{name}", **arguments)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Errors of S3 as ours; a missing name is FileNotFoundError and a lost race stays a ClientError."""
        try:
            yield
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in MISSING:
                raise FileNotFoundError(code) from error
            if code in TAKEN + CONFLICT:
                raise
            raise UsageError(f"{self.root} answers {code}; check the bucket's name and the AWS_* variables.") from error
        except (NoCredentialsError, PermissionError) as error:
            raise UsageError(f"{self.root} refuses ({error}); set the AWS_* variables to keys that fit.") from error
        except BotoCoreError as error:
            raise StageFailed(f"{self.root} cannot be reached ({error}); run again, what is done is kept.") from error
