"""What a dataclass of settings is given, against what its fields say."""

import types
from dataclasses import fields
from numbers import Integral, Real
from os import PathLike, fspath
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ACCEPTED: dict[Any, Any] = {int: Integral, float: Real, str: (str, PathLike)}  # numpy's numbers too, and paths
PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}


def check_types(settings: Any) -> None:
    """Raises TypeError for a bool, int, float, str or choice that is something else; other fields are left alone.

    An int is a float too; a bool is neither, though Python takes it for one. Numbers of numpy and paths become Python's
    own and text, as files hold them.
    """
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        kinds = _alternatives(hints[field.name])
        if all(kind in PLAIN or kind is type(None) or get_origin(kind) is Literal for kind in kinds):
            value = getattr(settings, field.name)
            if not any(_is(value, kind) for kind in kinds):
                raise TypeError(f"{field.name} must be {' or '.join(map(_named, kinds))}, got {value!r}")
            if not isinstance(value, bool | int | float | str | None):
                plain = fspath if isinstance(value, PathLike) else int if isinstance(value, Integral) else float
                setattr(settings, field.name, plain(value))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, ACCEPTED.get(kind, kind))


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    return PLAIN.get(kind, "None")
