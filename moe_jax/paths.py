"""Nested dictionaries of arrays and their flat form keyed by "a/b/c" paths."""

from __future__ import annotations

from typing import Any

from flax import traverse_util


def flatten_paths(tree: dict[str, Any]) -> dict[str, Any]:
    """{"layers": {"ffn": x}} -> {"layers/ffn": x}, in the order of the tree."""
    return traverse_util.flatten_dict(tree, sep="/")


def unflatten_paths(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_paths`."""
    return traverse_util.unflatten_dict(flat, sep="/")
