"""Configs to JSON and back, and dotted command-line overrides (`data.seq_len=256`).

Everything is typed by the dataclasses themselves, so a new option needs no line here. An unknown key names the
nearest one, a wrong type says what is expected, and validation runs once, after the last override.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from typing import Any, TypeVar

from moe_jax.errors import UserError

T = TypeVar("T")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def to_dict(config: Any) -> Any:
    """The config as JSON values: dataclasses become dicts, tuples become lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    return config


def from_dict(cls: type[T], data: Any, path: str = "") -> T:
    """The config of class `cls` that `to_dict` wrote; an unknown or mistyped key is a UserError.

    A missing one has its default: what an earlier version wrote did not know it yet.
    """
    return typing.cast(T, _build(cls, data, path))


def differences(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (value in `a`, value in `b`) of every option that differs between two configs."""
    left, right = (leaves(to_dict(config)) for config in (a, b))
    names = [*left, *(name for name in right if name not in left)]
    pairs = {name: (left.get(name), right.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def option_names(cls: type, path: str = "") -> list[str]:
    """Every dotted option below a config class; `*` stands for the index of a repeated part."""
    names: list[str] = []
    for name, hint in typing.get_type_hints(cls).items():
        (inner, _), item = _unwrap(hint), _item_type(hint)
        if item is not None:
            names += option_names(item, f"{path}{name}.*.")
        elif dataclasses.is_dataclass(inner):
            names += option_names(inner, f"{path}{name}.")
        else:
            names.append(path + name)
    return names


def apply(config: T, overrides: list[str]) -> T:
    """A copy of `config` with `dotted.name=value` texts applied in order.

    `none` switches an optional part off, `default` (or any name inside it) switches it on, a repeated part is
    reached by its index (the next free index appends one), and JSON gives a whole part at once.

    Raises:
        UserError: for a text without `=`, an unknown name, a mistyped value, or a config that does not validate.
    """
    data = to_dict(config)
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UserError(f"override {text!r} is not of the form name=value, as in data.seq_len=256")
        data = _set(type(config), data, name.split("."), value, name, type(config))
    return from_dict(type(config), data)


def nearest(name: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the closest known name, or all of them where none is close."""
    match = difflib.get_close_matches(name, known, 1, 0.5)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(sorted(known))}"


def leaves(data: Any, path: str = "") -> dict[str, Any]:
    """Dotted name -> value of what `to_dict` gave; an empty or switched-off part is one leaf."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    if not items:
        return {path: data}
    dot = f"{path}." if path else ""
    return {k: v for name, part in items for k, v in leaves(part, f"{dot}{name}").items()}


def _unwrap(hint: Any) -> tuple[Any, bool]:
    """(type without None, whether None is allowed)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return inner[0], len(inner) < len(typing.get_args(hint))
    return hint, False


def _item_type(hint: Any) -> Any:
    """X of `tuple[X, ...]`, else None."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None


def _build(hint: Any, data: Any, path: str) -> Any:
    hint, optional = _unwrap(hint)
    if data is None and optional:
        return None
    item = _item_type(hint)
    if item is not None:
        if not isinstance(data, list | tuple):
            raise UserError(f"{path} is {data!r}; expected a list")
        return tuple(_build(item, part, f"{path}.{i}") for i, part in enumerate(data))
    if dataclasses.is_dataclass(hint):
        if not isinstance(data, dict):
            raise UserError(f"{path or 'the config'} is {data!r}; expected a group of options")
        hints, dot = typing.get_type_hints(hint), f"{path}." if path else ""
        for name in data:
            if name not in hints:
                raise UserError(f"unknown option {dot + str(name)!r}{nearest(str(name), list(hints))}")
        return hint(**{name: _build(hints[name], part, dot + name) for name, part in data.items()})
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if type(data) is not hint:
        raise UserError(f"{path} is {data!r}; expected {_EXPECTED[hint]}")
    return data


def _set(hint: Any, data: Any, keys: list[str], text: str, name: str, root: type) -> Any:
    """`data` with the value at `keys` replaced; `hint` is the type at this depth."""
    hint, optional = _unwrap(hint)
    item = _item_type(hint)
    if not keys:
        return _parse(hint, optional, text, name)
    key = keys[0]
    if item is not None:
        data = list(data)
        if not key.isdecimal() or int(key) > len(data):
            raise UserError(f"{name}: {key!r} is no index of a list of {len(data)}; use 0 to {len(data)}")
        if int(key) == len(data):
            data.append(to_dict(item()))
        data[int(key)] = _set(item, data[int(key)], keys[1:], text, name, root)
        return data
    hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
    if key not in hints:
        raise UserError(f"unknown option {name!r}{_suggest(name, key, hints, root)}")
    data = to_dict(hint()) if data is None else data
    return data | {key: _set(hints[key], data[key], keys[1:], text, name, root)}


def _completed(hint: Any, data: Any, name: str) -> Any:
    """`data` with the defaults of what its groups leave out, so that a later word finds every option in it."""
    hint, optional = _unwrap(hint)
    if data is None and optional:
        return None
    if (item := _item_type(hint)) is not None:
        if not isinstance(data, list):
            raise UserError(f"{name} is {data!r}; expected a list")
        return [_completed(item, part, f"{name}.{i}") for i, part in enumerate(data)]
    if not dataclasses.is_dataclass(hint):
        return data
    if not isinstance(data, dict):
        raise UserError(f"{name} is {data!r}; expected a group of options")
    hints = typing.get_type_hints(hint)
    return to_dict(hint()) | {k: _completed(hints.get(k), v, f"{name}.{k}") for k, v in data.items()}


def _suggest(name: str, key: str, hints: dict[str, Any], root: type) -> str:
    """The right place of a name that exists elsewhere, else the nearest sibling, else the nearest of all."""
    known = option_names(root)
    same = [option for option in known if option.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    if same:
        return f"; did you mean {same[0]!r}?"
    if match := difflib.get_close_matches(key, list(hints), 1, 0.5):
        right = ".".join(match[0] if part == key else part for part in name.split("."))
        return f"; did you mean {right!r}?"
    return nearest(name, known)


def _parse(hint: Any, optional: bool, text: str, name: str) -> Any:
    if optional and text.lower() in ("none", "null"):
        return None
    if dataclasses.is_dataclass(hint) or _item_type(hint) is not None:
        if text == "default" and dataclasses.is_dataclass(hint):
            return to_dict(hint())
        try:
            value = json.loads(text)
        except ValueError:
            words = "JSON, none or default" if optional else "JSON"
            raise UserError(f"{name} is a group of options; expected {words}, got {text!r}") from None
        return _completed(hint, value, name)
    try:
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        return hint(text)
    except (ValueError, KeyError):
        raise UserError(f"{name} is {text!r}; expected {_EXPECTED[hint]}") from None
