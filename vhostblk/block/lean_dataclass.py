"""Dataclasses that cost little to declare: methods are shared, and `__init__` is compiled when it is first called.

The standard library compiles six functions for each frozen dataclass when it is declared, which takes half a
millisecond, and was a quarter of a short run of an image tool: most of its classes are never made an object of. What
is declared is a dataclass (`fields`, `replace` and `__post_init__` are as usual, and so is it for type checkers); only
the text of the functions is not made anew for each class.

Knows nothing about what is in them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

__all__ = ["lean_dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass as lean_dataclass
else:

    def lean_dataclass(*, frozen: bool = False, slots: bool, kw_only: bool = False):
        """Declare a dataclass that can be compared; the arguments are those of `dataclasses.dataclass`."""

        def declare(cls: type[Any]) -> type[Any]:
            fields = dataclasses.dataclass(
                init=False, repr=False, eq=False, slots=slots, kw_only=kw_only
            )
            cls = fields(cls)
            methods = {
                "__repr__": _repr,
                **_comparison(cls, frozen),
                **({"__setattr__": _refuse_set, "__delattr__": _refuse_delete} if frozen else {}),
            }
            for name, method in methods.items():
                if name not in cls.__dict__ or (name == "__hash__" and not cls.__dict__[name]):
                    setattr(cls, name, method)
            cls.__init__ = _first_init(cls, frozen)
            return cls

        return declare


def _first_init(cls: type[Any], frozen: bool) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - it is one
        compiled = _init(cls, frozen)
        cls.__init__ = compiled
        compiled(self, *args, **kwargs)

    return __init__


def _init(cls: type[Any], frozen: bool) -> Callable[..., None]:
    """What the standard library would make: each argument becomes an attribute."""
    values: dict[str, Any] = {"_set": object.__setattr__, "_absent": dataclasses.MISSING}
    plain: list[str] = ["self"]
    keywords: list[str] = []
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        name = value = field.name
        argument = name
        if field.default_factory is not dataclasses.MISSING:
            values[f"_make_{name}"] = field.default_factory
            argument, value = f"{name}=_absent", f"_make_{name}() if {name} is _absent else {name}"
        elif field.default is not dataclasses.MISSING:
            values[f"_default_{name}"] = field.default
            argument = f"{name}=_default_{name}"
        (keywords if field.kw_only else plain).append(argument)
        lines.append(f"_set(self, {name!r}, {value})" if frozen else f"self.{name} = {value}")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    arguments = ", ".join([*plain, *(["*", *keywords] if keywords else [])])
    made: dict[str, Callable[..., None]] = {}
    body = "\n ".join(lines or ["pass"])
    exec(f"def __init__({arguments}):\n {body}", values, made)
    made["__init__"].__qualname__ = f"{cls.__qualname__}.__init__"
    return made["__init__"]


def _comparison(cls: type[Any], frozen: bool) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls) if field.compare]
    # With one name it gives the value, and none is no number of names at all.
    values = attrgetter(*names) if names else type

    def __eq__(self: Any, other: object) -> bool:  # noqa: N807
        return values(self) == values(other) if type(other) is type(self) else NotImplemented

    def __hash__(self: Any) -> int:  # noqa: N807
        return hash(values(self))

    return {"__eq__": __eq__, "__hash__": __hash__ if frozen else None}


def _repr(self: Any) -> str:
    shown = [
        f"{field.name}={getattr(self, field.name)!r}"
        for field in dataclasses.fields(self)
        if field.repr
    ]
    return f"{type(self).__qualname__}({', '.join(shown)})"


def _refuse_set(self: Any, name: str, value: object) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_delete(self: Any, name: str) -> None:
    raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
