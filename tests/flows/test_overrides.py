"""`--set path=value`: every kind of annotation a recipe uses, and what a mistake says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from flows.overrides import override
from models.errors import UsageError


@dataclass(frozen=True)
class Data:
    fold: int | None = None
    folds: tuple[tuple[str, ...], ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refine:
    lam: str | float = "auto"
    scope: str | tuple[int, ...] = "foreground"
    floor: float = 0.2

    def __post_init__(self) -> None:
        if self.floor > 1:
            raise UsageError("floor lies in 0..1.")


@dataclass(frozen=True)
class Recipe:
    name: str = "toy"
    steps: int = 10
    flip: bool = True
    size: tuple[int, int] = (360, 480)
    layers: tuple[str, ...] = ("infrared",)
    form: Literal["F1", "F2", 3] = "F2"
    data: Data = field(default_factory=Data)
    refine: Refine = field(default_factory=Refine)


def value(assignment: str) -> Any:
    changed: Any = override(Recipe(), [assignment])
    for name in assignment.partition("=")[0].strip().split("."):
        changed = changed[name] if isinstance(changed, Mapping) else getattr(changed, name)
    return changed


@pytest.mark.parametrize(("assignment", "expected"), [
    ("name=a=b, c", "a=b, c"),
    ("name=12", "12"),
    ("steps=1_000", 1000),
    (" steps = 7 ", 7),
    ("flip=no", False),
    ("flip=True", True),
    ("size=180,240", (180, 240)),
    ("size=(180, 240)", (180, 240)),
    ("layers=infrared,rgb", ("infrared", "rgb")),
    ("layers=", ()),
    ("layers=()", ()),
    ("form=F1", "F1"),
    ("form=3", 3),
    ("data.fold=1", 1),
    ("data.fold=none", None),
    ("data.folds=(car,person),(bike)", (("car", "person"), ("bike",))),
    ("data.folds=((car,person))", (("car", "person"),)),
    ("data.folds=(car,person),", (("car", "person"),)),
    ("data.folds=None", None),
    ("data.options.size=64", 64),
    ("data.options.rate=0.5", 0.5),
    ("data.options.noise=true", True),
    ("data.options.kind=warm", "warm"),
    ("data.options=size:64,kind:warm", {"size": 64, "kind": "warm"}),
    ("refine.lam=0.3", 0.3),
    ("refine.lam=auto", "auto"),
    ("refine.scope=1,2", (1, 2)),
    ("refine.scope=all", "all"),
    ("refine.floor=1e-2", 0.01),
])  # fmt: skip
def test_values_are_parsed_by_annotation(assignment, expected):
    found = value(assignment)
    assert found == expected
    assert type(found) is type(expected)


def test_assignments_apply_in_order_and_touch_nothing_else():
    recipe = Recipe(data=Data(options={"size": 32, "frames": 8}))
    changed = override(recipe, ["steps=1", "data.fold=2", "data.options.size=64", "steps=5"])
    assert changed == Recipe(steps=5, data=Data(fold=2, options={"size": 64, "frames": 8}))
    assert recipe.data.options["size"] == 32


@pytest.mark.parametrize(("assignment", "message"), [
    ("steps", "write it as data.fold=1"),
    ("=3", "write it as data.fold=1"),
    ("stesp=3", r"no setting 'stesp'; a recipe has name, steps, .*Did you mean steps\?"),
    ("data.flod=1", r"no setting 'data.flod'; data has fold, folds, options. Did you mean fold\?"),
    ("steps=many", "steps=many does not fit; expected a whole number"),
    ("flip=maybe", "expected true or false"),
    ("form=F3", "expected F1 or F2 or 3"),
    ("size=1", r"expected \(a whole number, a whole number\)"),
    ("size=(1,2", "does not fit"),
    ("size=1),(2", "does not fit"),
    ("data.fold=x", "expected a whole number or none"),
    ("refine.floor=nan", "expected a number"),
    ("layers.0=x", "goes too deep; set layers itself"),
    ("data=x", "is a group of settings; set one of data.fold, data.folds, data.options"),
    ("refine.floor=2", "floor lies in"),
])  # fmt: skip
def test_a_mistake_says_what_to_write(assignment, message):
    with pytest.raises(UsageError, match=message):
        override(Recipe(), [assignment])
