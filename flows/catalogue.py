"""The catalogue: which flow runs a recipe, and which function a study. Importing it imports no engine.

Adding one is one line. The module of a table of recipes has `named(name)`, which makes one of them; the flow takes it.
A study is called as `study(name, recipe, seeds)`. Both return an outcome that has `as_dict()`.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from models.errors import UsageError, unknown

FLOWS = {
    "flows.recipes:RECIPES": "flows.nightly:nightly",
    "flows.generalised_recipes:GENERALISED": "flows.generalised:generalised",
    "flows.generalised_recipes:FOUNDATIONS": "flows.generalised:foundation",
}
STUDIES = {
    "ablation": "flows.studies:study",
    "pseudo": "flows.studies:study",
    "mix": "flows.studies:study",
    "modalities": "flows.studies:study",
    "degradation": "flows.studies:study",
    "fused": "flows.studies:study",
    "syn4seg": "flows.syn4seg:study",
    "labels": "flows.syn4seg:study",
    "fusers": "flows.fusion_studies:study",
    "masks": "flows.fusion_studies:study",
    "sensors": "flows.fusion_studies:study",
}
SEEDS = (510, 365, 382, 322, 988)
ROOT = Path(__file__).resolve().parents[1]


def night(name: str, assignments: Iterable[str] = ()) -> tuple[Callable, Any]:
    """The flow that runs a recipe, and the recipe with `path=value` settings applied.

    Raises UsageError: an unknown name lists the right ones.
    """
    return resolve_name(FLOWS[table_of(name)]), recipe(name, assignments)


def study(name: str, recipe_name: str, seeds: int, assignments: Iterable[str] = ()) -> tuple[Callable, Any, tuple]:
    """The function of a study, the recipe with settings applied, and the first of SEEDS. Raises UsageError."""
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    if not 1 <= seeds <= len(SEEDS):
        raise UsageError(f"There are {len(SEEDS)} seeds; give --seeds a number from 1 to {len(SEEDS)}.")
    return resolve_name(STUDIES[name]), recipe(recipe_name, assignments), SEEDS[:seeds]


def recipe(name: str, assignments: Iterable[str] = ()) -> Any:
    """The recipe of that name, of whatever table, with settings applied. Raises UsageError."""
    from flows.overrides import override

    module = table_of(name).partition(":")[0]
    return override(resolve_name(f"{module}:named")(name), assignments)


def table_of(name: str) -> str:
    """The key of FLOWS whose table has the recipe. Raises UsageError that lists the recipes of all tables."""
    for table in FLOWS:
        if name in names_of(table):
            return table
    raise unknown("recipe", name, recipes())


def recipes() -> dict[str, str]:
    """Name -> first line of its documentation, of the recipes of all tables, in their order."""
    return {name: about for table in FLOWS for name, about in names_of(table).items()}


def names_of(table: str) -> dict[str, str]:
    """The same of one table, read from its source: importing the recipes would import torch."""
    module, _, name = table.partition(":")
    source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    return read_recipes(source, name)


def read_recipes(source: str, table: str = "RECIPES") -> dict[str, str]:
    """The keys of a dict literal in a module's source, each with the docstring of the function behind it."""
    body = ast.parse(source).body
    about = {node.name: ast.get_docstring(node) or "" for node in body if isinstance(node, ast.FunctionDef)}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == table for target in targets):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            return {key.value: about.get(_called(value), "").partition("\n")[0] for key, value in pairs}
    return {}


def _called(value: ast.expr) -> str:
    value = value.body if isinstance(value, ast.Lambda) else value
    value = value.func if isinstance(value, ast.Call) else value
    return value.id if isinstance(value, ast.Name) else ""
