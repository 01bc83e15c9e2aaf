"""The store: every output in a folder named by its digest, true once its manifest is there.

    <root>/<kind>/<digest>/   files ..., rows.parquet, manifest.json (written last, once, never again)

The digest is taken of the inputs' digests, the settings and the stage's code, so the same question has the same
folder and is answered once. Root is a local folder or `s3://bucket/prefix`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from models.errors import StageFailed, UsageError
from tasks import places
from tasks.blobs import Folder
from tasks.stage import note

if TYPE_CHECKING:
    from pandas import DataFrame

MANIFEST = "manifest.json"
ROWS = "rows.parquet"


@dataclasses.dataclass(frozen=True)
class Ref:
    """What passes between stages: where an output lies, what it is, what it was made of, how many rows it has."""

    uri: str
    kind: str
    digest: str
    count: int


def canonical(value: Any) -> Any:
    """`value` as plain JSON values with one spelling each: dataclasses are dicts, tuples lists, paths strings."""
    if isinstance(value, Ref):
        return value.digest
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: canonical(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(canonical(item) for item in value)
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "item"):  # a numpy scalar
        return value.item()
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise UsageError(f"A {type(value).__name__} has no digest; use numbers, strings, tuples and dataclasses.")


def canonical_json(value: Any) -> bytes:
    return json.dumps(canonical(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(kind: str, inputs: Iterable[Ref | str], settings: Any, code: Iterable[str] = ()) -> str:
    """16 hexadecimal digits that stand for one output: same question, same digest, on every
    machine with the same minor version of Python, whose own spelling of `code` is what counts.

    Args:
        kind: what is made.
        inputs: the refs (or digests) it is made of, in order.
        settings: dataclass, dict or tuple of plain values.
        code: dotted names of the modules whose code takes part, less comments and docstrings; a package stands for its
            own modules.
    """
    question = {
        "kind": kind,
        "inputs": list(inputs),
        "settings": settings,
        "code": {name: _source_digest(name) for name in sorted(set(code))},
    }
    return hashlib.sha256(canonical_json(question)).hexdigest()[:16]


def _source_digest(name: str) -> str:
    """The digest of a module's code. The module itself is not imported, only the packages around it."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None or not spec.origin:
        raise UsageError(f"There is no module {name!r} to digest; give dotted names such as models.backbone.")
    origin = Path(spec.origin)
    files = sorted(origin.parent.glob("*.py")) if spec.submodule_search_locations is not None else [origin]
    return hashlib.sha256("".join(f"{path.name}\0{_bare(path.read_bytes())}\0" for path in files).encode()).hexdigest()


@cache
def _bare(source: bytes) -> str:
    """A module's source without comments, docstrings and layout: a word of explanation computes nothing again."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.unparse(tree)


class Store:
    """A folder or a bucket of outputs. Pickles as its root; nothing is opened before it is used."""

    def __init__(self, root: str):
        self.root = str(root).rstrip("/") if "://" in str(root) else str(Path(root).expanduser().absolute())

    def __reduce__(self) -> tuple:
        return Store, (self.root,)

    @cached_property
    def blobs(self) -> Any:
        if "://" not in self.root:
            return Folder(self.root)
        if not self.root.startswith("s3://"):
            raise UsageError(f"{self.root!r} is neither a folder nor s3://bucket/prefix; set THERMOFUSE_STORE.")
        from tasks.bucket import Bucket

        return Bucket(self.root)

    def find(self, kind: str, digest: str) -> Ref | None:
        """The output of that digest, or None when no manifest says that it is done."""
        if not self.blobs.exists(f"{kind}/{digest}/{MANIFEST}"):
            return None
        note(found=1)
        return self._ref(kind, digest)

    def draft(self, kind: str, digest: str) -> Draft:
        """The folder of an output that is being made."""
        return Draft(self, kind, digest)

    def manifest(self, ref: Ref) -> dict[str, Any]:
        """{"kind", "digest", "count", "files": {name: sha256}, "meta": {...}} of an output."""
        try:
            return json.loads(self.blobs.read(f"{ref.kind}/{ref.digest}/{MANIFEST}"))
        except FileNotFoundError as error:
            raise UsageError(f"{ref.uri} is not in {self.root}; run the stage that makes it again.") from error

    def rows(self, ref: Ref, name: str = ROWS) -> DataFrame:
        """A parquet table of an output as a frame; a missing string is None."""
        return read_table(self.blobs.read(f"{ref.kind}/{ref.digest}/{name}"))

    def local(self, ref: Ref) -> Path:
        """The output's folder on this machine's disk: itself, or a checked copy of a bucket's in `home()`."""
        if isinstance(self.blobs, Folder):
            return self.blobs.path(f"{ref.kind}/{ref.digest}")
        return _mirror(self, ref)

    def _ref(self, kind: str, digest: str) -> Ref:
        stored = json.loads(self.blobs.read(f"{kind}/{digest}/{MANIFEST}"))
        return Ref(f"{self.root}/{kind}/{digest}", kind, digest, stored["count"])


class Draft:
    """An output that is being written. Nobody trusts it before `commit`."""

    def __init__(self, store: Store, kind: str, digest: str):
        self.store, self.kind, self.digest = store, kind, digest
        self.files: dict[str, str] = {}

    def write(self, name: str, data: bytes) -> str:
        """Write one file whole, and list it in the manifest; returns its sha256."""
        self.store.blobs.write(self._name(name), data)
        self.files[name] = hashlib.sha256(data).hexdigest()
        return self.files[name]

    def create(self, name: str, data: bytes) -> bool:
        """Write one file whole unless it is there; it is not listed. True when it was this call that wrote it."""
        return bool(self.store.blobs.create(self._name(name), data))

    def read(self, name: str) -> bytes:
        return self.store.blobs.read(self._name(name))

    def read_all(self, folder: str) -> list[bytes]:
        """The files of a folder of this output, in the order of their names."""
        return self.store.blobs.read_many(self.store.blobs.names(self._name(folder)))

    def exists(self, name: str) -> bool:
        return self.store.blobs.exists(self._name(name))

    def upload(self, folder: Path) -> None:
        """Write every file below a local folder, under its path there."""
        for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
            self.write(path.relative_to(folder).as_posix(), path.read_bytes())

    def commit(self, rows: DataFrame | None, meta: dict[str, Any], count: int | None = None) -> Ref:
        """Make the output true: the rows, then the manifest, once. Who comes second gets the first one's output."""
        manifest = f"{self.kind}/{self.digest}/{MANIFEST}"
        if not self.store.blobs.exists(manifest):
            if rows is not None:
                self.write(ROWS, table_bytes(rows))
            count = count if count is not None else (len(rows) if rows is not None else len(self.files))
            stored = {"kind": self.kind, "digest": self.digest, "count": count, "files": self.files, "meta": meta}
            text = json.dumps(canonical(stored), indent=1, sort_keys=True).encode()
            if self.store.blobs.create(manifest, text):
                note(committed=1)
        return self.store._ref(self.kind, self.digest)

    def _name(self, name: str) -> str:
        if name.startswith("/") or ".." in PurePath(name).parts or not name:
            raise ValueError(f"{name!r} is not a name inside an output")
        return f"{self.kind}/{self.digest}/{name}"


def table_bytes(frame: DataFrame) -> bytes:
    """A frame as parquet; the same rows give the same bytes."""
    buffer = io.BytesIO()
    frame.to_parquet(buffer, index=False, compression="zstd")
    return buffer.getvalue()


def read_table(data: bytes) -> DataFrame:
    """A parquet table as a frame whose strings are str or None."""
    import pandas

    frame = pandas.read_parquet(io.BytesIO(data))
    for name in [name for name, kind in frame.dtypes.items() if isinstance(kind, pandas.StringDtype)]:
        frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
    return frame


def _mirror(store: Store, ref: Ref) -> Path:
    """Copy an output from a bucket, check every file against its sha256, then move the copy into place at once."""
    stored = store.manifest(ref)
    identity = hashlib.sha256(canonical_json(stored["files"])).hexdigest()[:8]
    target = places.home() / "mirror" / ref.kind / f"{ref.digest}-{identity}"
    if target.is_dir():
        return target
    copy = places.home() / "mirror" / ".tmp" / uuid.uuid4().hex
    try:
        store.blobs.fetch(f"{ref.kind}/{ref.digest}", [*stored["files"], MANIFEST], copy)
        for name, expected in stored["files"].items():
            if hashlib.sha256((copy / name).read_bytes()).hexdigest() != expected:
                raise StageFailed(f"{ref.uri}/{name} is damaged; delete {ref.uri} and run again.")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(copy, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return target
