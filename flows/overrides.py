"""Change single settings of a recipe from text: `data.fold=1`, parsed by the annotations of the dataclass tree.

int, float, str     as written (3, 1e-4, a word)
bool                true or false, yes or no, on or off, 1 or 0
X | None            none, else an X
tuple[X, ...]       X,X,X or (X,X,X); () is empty; tuples nest: (car,person),(bike)
Literal[...]        one of the words
Mapping             data.options.size=64 sets one key; data.options=size:64,frames:8 sets them all
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from models.errors import UsageError

T = TypeVar("T")
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def override(recipe: T, assignments: Iterable[str]) -> T:
    """The recipe with each `path=value` applied, in order.

    Raises UsageError: an unknown name lists the right ones, a value that does not parse says what was expected.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise UsageError(f"{assignment!r} is no assignment; write it as data.fold=1.")
        recipe = _set(recipe, path.strip().split("."), text.strip(), path.strip())
    return recipe


def _set(tree: Any, names: list[str], text: str, path: str) -> Any:
    name, rest = names[0], names[1:]
    fields = [field.name for field in dataclasses.fields(tree)]
    if name not in fields:
        close = get_close_matches(name, fields, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UsageError(f"There is no setting {path!r}; {_place(path, rest)} has {', '.join(fields)}.{hint}")
    value, hint = getattr(tree, name), get_type_hints(type(tree))[name]
    if rest and isinstance(value, Mapping):
        new: Any = {**value, ".".join(rest): _anything(text)}
    elif rest:
        if not dataclasses.is_dataclass(value):
            raise UsageError(f"{path!r} goes too deep; set {path.removesuffix('.' + '.'.join(rest))} itself.")
        new = _set(value, rest, text, path)
    elif dataclasses.is_dataclass(value):
        inside = ", ".join(f"{path}.{field.name}" for field in dataclasses.fields(value))
        raise UsageError(f"{path!r} is a group of settings; set one of {inside}.")
    else:
        new = _parsed(text, hint, path)
    return dataclasses.replace(tree, **{name: new})


def _place(path: str, rest: list[str]) -> str:
    parent = path.split(".")[: -1 - len(rest)]
    return ".".join(parent) or "a recipe"


def _parsed(text: str, hint: Any, path: str) -> Any:
    try:
        return parse(text, hint)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{path}={text} does not fit; expected {describe(hint)}.") from error


def parse(text: str, hint: Any) -> Any:
    """`text` as a value of the annotation `hint`. Raises ValueError or KeyError when it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in PARSERS:
        return PARSERS[hint](text)
    if origin is Literal:
        return {str(option): option for option in arguments}[text]
    if origin in (Union, types.UnionType):
        return _union(text, arguments)
    if hint is tuple or origin is tuple:
        return _tuple(text, arguments or (Any, ...))
    if hint is dict or (isinstance(origin or hint, type) and issubclass(origin or hint, Mapping)):
        pairs = [part.split(":", 1) for part in _split(text)]
        return {key.strip(): _anything(value.strip()) for key, value in pairs}
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        raise ValueError("a group of settings")
    return _anything(text)


def describe(hint: Any) -> str:
    """An annotation in words, for messages."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is tuple and arguments[-1:] == (...,):
        return f"{describe(arguments[0])}s with commas"
    if origin is tuple:
        return f"({', '.join(map(describe, arguments))})"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def _none(text: str) -> None:
    if text.lower() not in ("none", "null", ""):
        raise ValueError(text)


def _bool(text: str) -> bool:
    if text.lower() not in WORDS:
        raise ValueError(text)
    return WORDS[text.lower()]


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):  # neither JSON nor a digest takes it
        raise ValueError(text)
    return number


PARSERS = {int: int, float: _float, str: str, bool: _bool, type(None): _none}


def _union(text: str, hints: tuple) -> Any:
    """The first member that takes the text; `none` comes first and plain text last, whatever their order."""
    for hint in sorted(hints, key=lambda hint: (hint is str) - (hint is type(None))):
        try:
            return parse(text, hint)
        except (ValueError, KeyError):
            continue
    raise ValueError(text)


def _tuple(text: str, hints: tuple) -> tuple:
    parts = _split(text)
    if len(hints) == 2 and hints[1] is ...:
        return tuple(parse(part, hints[0]) for part in parts)
    if len(parts) != len(hints):
        raise ValueError(text)
    return tuple(parse(part, hint) for part, hint in zip(parts, hints, strict=True))


def _anything(text: str) -> Any:
    """The narrowest of none, whole number, number, true/false and text."""
    for hint in (type(None), int, float):
        try:
            return parse(text, hint)
        except ValueError:
            continue
    return WORDS.get(text.lower(), text)


def _split(text: str) -> list[str]:
    """Parts between the commas outside brackets; one pair of brackets around the whole is taken off first."""
    parts = _cut(text)
    wrapped = len(parts) == 1 and parts[0][:1] + parts[0][-1:] in ("()", "[]") and not text.endswith(",")
    return _cut(parts[0][1:-1]) if wrapped else parts


def _cut(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if depth < 0:
            raise ValueError(text)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise ValueError(text)
    return [part.strip() for part in parts if part.strip()]
