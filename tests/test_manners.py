"""The manners that a reviewer would otherwise police: short functions, short modules, no leftovers, quiet imports."""

from __future__ import annotations

import ast
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flows", "tasks", "models")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
TEXTS = [path for path in ROOT.glob("*") if path.is_file() and path.name != "LICENSE"]
TEXTS += [path for folder in ("infra", ".ci") for path in (ROOT / folder).rglob("*") if path.is_file()]
TEXTS = [path for path in [*TEXTS, *SOURCES, *TESTS] if path.suffix not in {".png", ".db"}]

# Spelt apart, so that this file does not find itself.
LEFTOVERS = [r"\bTO" r"DO\b", r"\bFIX" r"ME\b", "raise NotImplemented" "Error", "assert Tr" r"ue\b"]
MACHINES = [r"(?<![\w.*])/(?:home|root|Users|work)" "/", "file:" "//", r"(?:pypi|pythonhosted)\.org"]
UNWANTED = re.compile("|".join(LEFTOVERS + MACHINES))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function of a file and its lines of code: its docstring, which may be long, is not counted."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield f"{name(path)}:{node.lineno} {node.name}", lines


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_module_fits_the_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 300


def test_functions_are_short() -> None:
    lengths = dict(pair for path in SOURCES for pair in functions(path))
    long = {where: lines for where, lines in lengths.items() if lines > 40}
    assert statistics.median(lengths.values()) <= 12
    assert len(long) <= len(lengths) / 50, long
    assert max(lengths.values()) <= 60, long


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_nothing_is_left_over(path: Path) -> None:
    """No notes to self, and no path or host of the machine a line was written on."""
    assert UNWANTED.findall(path.read_text()) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_a_module_says_what_it_is(path: Path) -> None:
    text = path.read_text()
    assert not text.strip() or ast.get_docstring(ast.parse(text)), "starts without a docstring"


def test_a_skipped_test_has_a_reason() -> None:
    skip = re.compile(r"(?:pytest\.skip|mark\.skip|mark\.skipif|mark\.xfail)(?:\((?P<arguments>[^\n]*))?")
    for path in TESTS:
        for match in skip.finditer(path.read_text()) if path != Path(__file__) else ():
            assert "reason=" in (match["arguments"] or "") or '"' in (match["arguments"] or ""), (path, match[0])


WATCH = """
import importlib, json, logging, os, pathlib, sys

packages, modules = json.loads(sys.argv[1]), json.loads(sys.argv[2])
seen = []

def culprit():
    # The nearest frame of ours, unless the import system stands between: then a library did it, at our import.
    frame = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename
        if "importlib" in file:
            return None
        if any(file.startswith(package) for package in packages):
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back

def note(what):
    where = culprit()
    if where:
        seen.append(f"{where} {what}")

def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event in ("os.mkdir", "os.remove", "subprocess.Popen", "socket.connect", "os.putenv"):
        note(event)

read = os._Environ.__getitem__
os._Environ.__getitem__ = lambda self, key: (note(f"reads {key}"), read(self, key))[1]
sys.addaudithook(hook)
for module in modules:
    importlib.import_module(module)
torch = sys.modules.get("torch")
if torch and torch.cuda.is_initialized():
    seen.append("CUDA is initialised")
print(json.dumps(seen))
"""


def watch(packages: list[Path], modules: list[str], folder: Path) -> list[str]:
    """What importing `modules` did, as far as code under `packages` did it: reads of the environment, writes."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", WATCH, json.dumps([str(path) for path in packages]), json.dumps(modules)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_does_nothing(tmp_path: Path) -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in SOURCES]
    modules = [module.removesuffix(".__init__") for module in modules]
    seen = watch([ROOT / package for package in PACKAGES], modules, tmp_path)
    # @flow makes the form of its parameters as it decorates, and pydantic and Prefect read their settings to do so.
    flows = tuple(f"{ROOT / 'flows' / name}.py:" for name in ("nightly", "generalised"))
    assert [line for line in seen if not (line.startswith(flows) and " reads " in line)] == []
    assert list(tmp_path.iterdir()) == []


def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("import os\nos.mkdir('made')\nHOME = os.environ.get('HOME', '')\n")
    seen = [line.split(" ", 1)[1] for line in watch([tmp_path], ["loud"], tmp_path)]
    assert seen == ["os.mkdir", "reads HOME"]
