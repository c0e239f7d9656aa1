"""A lean dataclass behaves as the standard library's does: each is declared as both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from vhostblk.block.lean_dataclass import lean_dataclass

DECORATORS = [dataclasses.dataclass, lean_dataclass]


def declare(decorate: Callable[..., Any], frozen: bool) -> tuple[type[Any], type[Any]]:
    @decorate(frozen=frozen, slots=True)
    class Point:
        x: int
        y: int = 2
        tags: list[str] = dataclasses.field(default_factory=list, compare=False)

    @decorate(frozen=frozen, slots=True, kw_only=True)
    class Place(Point):
        name: str
        note: str = dataclasses.field(default="", repr=False, metadata={"about": "nothing"})

        def __post_init__(self) -> None:
            object.__setattr__(self, "note", self.note.upper())

    return Point, Place


def both(frozen: bool) -> list[tuple[type[Any], type[Any]]]:
    return [declare(decorate, frozen) for decorate in DECORATORS]


def outcome(call: Callable[[], Any]) -> object:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "use",
    [
        lambda point, place: repr(point(1)),
        lambda point, place: repr(point(1, tags=["a"])),
        lambda point, place: repr(place(1, 3, name="n", note="hidden")),
        lambda point, place: place(1, name="n", note="loud").note,
        lambda point, place: point(1, tags=["a"]) == point(1, 2),
        lambda point, place: point(1) == point(2),
        lambda point, place: point(1) == (1, 2),
        lambda point, place: point(1) == place(1, name="n"),
        lambda point, place: point(1).tags is point(1).tags,
        lambda point, place: hash(point(1)) == hash(point(1, tags=["a"])),
        lambda point, place: hash(place(1, name="n")) == hash(place(1, name="m")),
        lambda point, place: len({place(1, name="n"), place(1, name="n"), place(2, name="n")}),
        lambda point, place: repr(dataclasses.replace(place(1, name="n"), x=5, note="z")),
        lambda point, place: dataclasses.asdict(place(1, name="n")),
        lambda point, place: [field.name for field in dataclasses.fields(place)],
        lambda point, place: dataclasses.fields(place)[-1].metadata["about"],
        lambda point, place: point(),
        lambda point, place: point(1, 2, [], 4),
        lambda point, place: place(1, 2, [], "n"),
        lambda point, place: point(1, z=3),
        lambda point, place: setattr(point(1), "x", 2),
        lambda point, place: delattr(place(1, name="n"), "y"),
        lambda point, place: hasattr(point(1), "__dict__"),
        lambda point, place: point.__match_args__ + place.__match_args__,
    ],
)
def test_lean_dataclass_does_what_a_dataclass_does(
    frozen: bool, use: Callable[[type[Any], type[Any]], Any]
) -> None:
    usual, lean = (outcome(partial(use, *classes)) for classes in both(frozen))
    assert lean == usual


def test_its_own_methods_stay() -> None:
    @lean_dataclass(frozen=True, slots=True)
    class Named:
        name: str

        def __repr__(self) -> str:
            return self.name

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Named)

    assert repr(Named("a")) == "a"
    assert Named("a") == Named("b")


def test_without_fields_all_are_alike() -> None:
    @lean_dataclass(frozen=True, slots=True)
    class Nothing:
        pass

    assert Nothing() == Nothing()
    assert len({Nothing(), Nothing()}) == 1
    assert repr(Nothing()).endswith("Nothing()")


def test_init_is_compiled_once_and_for_this_class_only() -> None:
    point, place = declare(lean_dataclass, True)
    before = point.__init__
    place(1, name="n")
    assert point.__init__ is before
    point(1)
    compiled = point.__init__
    assert compiled is not before
    point(2)
    assert point.__init__ is compiled
