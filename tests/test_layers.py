"""Imports run one way, models stay pure torch, and what ships is exactly three packages."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent
ENGINES = ("ray", "prefect", "mlflow", "fsspec", "s3fs")  # accelerate imports boto3 by itself where it is installed


def modules(package: str) -> list[str]:
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")]
    return sorted(name.removesuffix(".__init__") for name in names)


def test_imports_run_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_models_pull_in_no_engine() -> None:
    """Also what import-linter cannot see: an engine that a third-party library imports on our behalf."""
    program = (
        "import importlib, sys\n"
        f"for name in {modules('models')!r}: importlib.import_module(name)\n"
        f"print(*sorted(set(sys.modules) & set({ENGINES!r})))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_wheel_holds_exactly_three_packages(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"flows", "tasks", "models"}
    assert {"flows/__init__.py", "tasks/__init__.py", "models/__init__.py"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".png", ".pth", ".safetensors", ".parquet"))]
