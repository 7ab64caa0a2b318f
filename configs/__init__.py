"""Run configurations by name: every public function of this package's modules that returns a `RunConfig`.

A config function takes no argument, and its docstring is its lab note: purpose, command, expected result.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
from types import FunctionType

from moe_jax.config import RunConfig
from moe_jax.errors import UserError
from moe_jax.files import location
from moe_jax.overrides import apply, from_dict, nearest


def registered() -> dict[str, FunctionType]:
    """Name -> config function, in alphabetical order of the names."""
    found: dict[str, FunctionType] = {}
    for module_info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            if (
                function.__module__ == module.__name__
                and not name.startswith("_")
                and not signature.parameters
                and signature.return_annotation in (RunConfig, "RunConfig")
            ):
                if name in found:
                    raise ValueError(f"two configs are called {name}")
                found[name] = function
    return dict(sorted(found.items()))


def get(name: str) -> RunConfig:
    """The registered config of that name; an unknown name is a UserError with the nearest one."""
    functions = registered()
    if name not in functions and location(name).is_dir():
        raise UserError(f"{name} is a folder; name a config, or as one {os.path.join(name, 'config.json')}")
    if name not in functions:
        raise UserError(f"no config is called {name!r}{nearest(name, list(functions))}")
    return functions[name]()


def families() -> dict[str, list[str]]:
    """Family -> names of its stages, in the order in which its module defines them.

    A family's stages are named `<family>_<stage>`; its first may bear the family's name alone. A single
    stage is not a family.
    """
    functions = registered()
    named = {name: function().stage for name, function in functions.items()}
    found = {name: [name] for name in functions if not name.endswith(f"_{named[name]}")}
    ordered = sorted(functions, key=lambda name: functions[name].__code__.co_firstlineno)
    for name in ordered:
        if name not in found:
            found.setdefault(name.removesuffix(f"_{named[name]}"), []).append(name)
    return {family: names for family, names in found.items() if len(names) > 1}


def stages(family: str) -> list[str]:
    """The names of a family's stages, in order; an unknown family is a UserError with the nearest one."""
    found = families()
    if family not in found:
        raise UserError(f"no family of stages is called {family!r}{nearest(family, list(found))}")
    return found[family]


def summary(name: str) -> str:
    """The first line of the config function's docstring."""
    return (inspect.getdoc(registered()[name]) or "").partition("\n")[0]


def load(name: str, overrides: list[str] | None = None) -> RunConfig:
    """A registered config, or a `.json` file such as a run's config.json, with dotted overrides applied."""
    if not name.endswith(".json"):
        return apply(get(name), overrides or [])
    try:
        data = json.loads(location(name).read_text())
    except Exception as error:  # what gcsfs raises is of many kinds
        raise UserError(f"{name} cannot be read as JSON ({error}); name a registered config") from None
    try:
        cfg = from_dict(RunConfig, data)
    except UserError as error:
        raise UserError(f"{name} is no config: {error}") from None
    return apply(cfg, overrides or [])
