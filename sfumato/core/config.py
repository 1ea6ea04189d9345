"""Configs are frozen dataclasses; this turns them into JSON and back, and says clearly what is wrong with a hand-written one.

A field whose type is a union of dataclasses is told apart by the `kind` that each of them carries.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """ ", did you mean 'x'?" or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean '{found[0]}'?" if found else ""


def at_least(low: float, **values: float) -> None:
    """Raises ValueError for a value that is not a finite number from `low` on."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= low):
            raise ValueError(f"{name} (={value}) must be at least {low}" + ("" if math.isfinite(value) else ", and finite"))


def to_json(config: Any) -> Any:
    """A dataclass as plain dicts, lists and scalars."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (tuple, list)):
        return [to_json(v) for v in config]
    if isinstance(config, dict):
        return {k: to_json(v) for k, v in config.items()}
    return config


def from_json(kind: type[T], data: Any, where: str = "config") -> T:
    """Rebuilds a dataclass of type `kind`. Raises ValueError for an unknown key, a missing one or a value of the wrong type."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be an object, not {data!r}")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if hints.get("kind") is str and "kind" in data and data["kind"] != fields["kind"].default:
        raise ValueError(f"{where}.kind (={data['kind']!r}) must be {fields['kind'].default!r}")
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}.{key} is not a field of {kind.__name__}{nearest(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise ValueError(f"{where}.{name} is missing")
    return kind(**{k: _value(hints[k], v, f"{where}.{k}") for k, v in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _from_union([a for a in args if a is not type(None)], value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} (={value!r}) must be a list")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ValueError(f"{where} (={value!r}) must have {len(inner)} entries")
        return tuple(_value(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} (={value!r}) must be an object")
        return {k: _value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where} (={value!r}) must be one of {', '.join(map(str, args))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ValueError(f"{where} (={value!r}) must be of type {hint.__name__}")
    return value


def _from_union(choices: list[Any], value: Any, where: str) -> Any:
    configs = [c for c in choices if dataclasses.is_dataclass(c)]
    if not configs or not isinstance(value, dict):
        return _value(choices[0], value, where)
    if len(configs) == 1:
        return from_json(configs[0], value, where)
    kinds = {next(f.default for f in dataclasses.fields(c) if f.name == "kind"): c for c in configs}
    if value.get("kind") not in kinds:
        raise ValueError(f"{where}.kind (={value.get('kind')!r}) must be one of {', '.join(map(str, kinds))}")
    return from_json(kinds[value["kind"]], value, where)
