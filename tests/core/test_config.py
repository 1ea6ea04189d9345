from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.config import from_json, nearest, to_json


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: str = "circle"
    radius: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Box:
    kind: str = "box"
    sides: tuple[int, int] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One of everything that a config may hold."""

    size: int
    name: str = "x"
    rate: float = 0.5
    loud: bool = False
    mode: Literal["slow", "fast"] = "slow"
    widths: tuple[int, ...] = (1,)
    shape: Circle | Box = field(default_factory=Circle)
    limit: int | None = None
    frame: Box | None = None
    weights: dict[str, float] = field(default_factory=dict)
    several: tuple[Circle, ...] = ()
    box: Box = field(default_factory=Box)


numbers = st.floats(allow_nan=False, allow_infinity=False)
circles = st.builds(Circle, radius=numbers)
boxes = st.builds(Box, sides=st.tuples(st.integers(), st.integers()))
pictures = st.builds(
    Picture,
    size=st.integers(),
    name=st.text(),
    rate=numbers,
    loud=st.booleans(),
    mode=st.sampled_from(("slow", "fast")),
    widths=st.lists(st.integers(), max_size=4).map(tuple),
    shape=circles | boxes,
    limit=st.none() | st.integers(),
    frame=st.none() | boxes,
    weights=st.dictionaries(st.text(max_size=3), numbers, max_size=3),
    several=st.lists(circles, max_size=3).map(tuple),
    box=boxes,
)


@given(pictures)
def test_round_trip_through_text(picture: Picture) -> None:
    again = from_json(Picture, json.loads(json.dumps(to_json(picture))))
    assert again == picture
    for f in dataclasses.fields(Picture):
        assert type(getattr(again, f.name)) is type(getattr(picture, f.name))


def test_what_is_not_said_keeps_its_default() -> None:
    assert from_json(Picture, {"size": 3}) == Picture(size=3)


def test_an_integer_is_good_enough_for_a_float() -> None:
    rate = from_json(Picture, {"size": 3, "rate": 2}).rate
    assert rate == 2.0
    assert isinstance(rate, float)


def test_unions_are_told_apart_by_kind() -> None:
    assert from_json(Picture, {"size": 1, "shape": {"kind": "box", "sides": [3, 4]}}).shape == Box(sides=(3, 4))
    assert from_json(Picture, {"size": 1, "shape": {"kind": "circle"}}).shape == Circle()


WRONG: list[tuple[Any, str]] = [
    ({"size": 1, "nam": "y"}, r"config\.nam is not a field of Picture, did you mean 'name'\?"),
    ({"size": 1, "zzz": 0}, r"config\.zzz is not a field of Picture$"),
    ({}, r"config\.size is missing"),
    ([], r"config must be an object, not \[\]"),
    ({"size": "3"}, r"config\.size \(='3'\) must be of type int"),
    ({"size": 3.0}, r"config\.size \(=3\.0\) must be of type int"),
    ({"size": True}, r"config\.size \(=True\) must be of type int"),
    ({"size": 1, "rate": "fast"}, r"config\.rate \(='fast'\) must be of type float"),
    ({"size": 1, "rate": True}, r"config\.rate \(=True\) must be of type float"),
    ({"size": 1, "loud": 1}, r"config\.loud \(=1\) must be of type bool"),
    ({"size": 1, "name": None}, r"config\.name \(=None\) must be of type str"),
    ({"size": 1, "mode": "warp"}, r"config\.mode \(='warp'\) must be one of slow, fast"),
    ({"size": 1, "widths": 3}, r"config\.widths \(=3\) must be a list"),
    ({"size": 1, "widths": [1, "2"]}, r"config\.widths\[1\] \(='2'\) must be of type int"),
    ({"size": 1, "shape": {"kind": "box", "sides": [1]}}, r"config\.shape\.sides \(=\[1\]\) must have 2 entries"),
    ({"size": 1, "shape": {"kind": "star"}}, r"config\.shape\.kind \(='star'\) must be one of circle, box"),
    ({"size": 1, "shape": {}}, r"config\.shape\.kind \(=None\) must be one of circle, box"),
    ({"size": 1, "shape": 3}, r"config\.shape must be an object, not 3"),
    ({"size": 1, "shape": {"kind": "circle", "radios": 1}}, r"config\.shape\.radios is not a field of Circle, did you mean 'radius'\?"),
    ({"size": 1, "limit": "9"}, r"config\.limit \(='9'\) must be of type int"),
    ({"size": 1, "frame": {"sides": [1, None]}}, r"config\.frame\.sides\[1\] \(=None\) must be of type int"),
    ({"size": 1, "several": [{}, {"radius": "r"}]}, r"config\.several\[1\]\.radius \(='r'\) must be of type float"),
    ({"size": 1, "weights": {"a": "heavy"}}, r"config\.weights\.a \(='heavy'\) must be of type float"),
    ({"size": 1, "weights": 3}, r"config\.weights \(?=?.*3"),
    ({"size": 1, "box": {"kind": "circle"}}, r"config\.box\.kind \(='circle'\)"),
]


@pytest.mark.parametrize(("data", "message"), WRONG, ids=lambda v: json.dumps(v) if not isinstance(v, str) else "")
def test_what_is_wrong_is_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_json(Picture, data)
    assert "\n" not in str(caught.value)


def test_nearest() -> None:
    assert nearest("lerning_rate", ["batch", "learning_rate"]) == ", did you mean 'learning_rate'?"
    assert nearest("q", ["batch", "learning_rate"]) == ""
