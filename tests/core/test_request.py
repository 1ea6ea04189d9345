from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.request import GenerateRequest, metadata_text, parameters_text, parse_metadata, parse_parameters, style_weights


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "x" * 100_000}, "100,000 characters"),
        ({"steps": 0}, r"steps \(=0\)"),
        ({"steps": 10**6}, "steps"),
        ({"count": 0}, "count"),
        ({"seed": -1}, r"seed \(=-1\)"),
        ({"seed": 2**63}, "seed"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"eta": 1.5}, "eta"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"style": "a:b"}, "style"),
        ({"style": "a:0"}, "one above 0"),
        ({"style": "a:1e308,b:1e308"}, "finite shares"),
        ({"steps": 2.5}, "whole number"),
        ({"seed": 1.5}, r"seed \(=1.5\) must be a whole number"),
        ({"guidance": "7"}, r"guidance \(='7'\) must be a number"),
        ({"style": 3}, r"style \(=3\) must be a text"),
        ({"prompt": 3}, r"prompt \(=3\) must be a text"),
        ({"prompt": "\udc80"}, "UTF-8"),
        ({"style": ""}, "style"),
        ({"strength": 0.0}, r"strength \(=0\.0\) must be above 0"),
        ({"strength": 2}, "at most 1"),
        ({"mask": "m.png"}, r"mask \(='m\.png'\) says where to redraw the init picture"),
    ],
)
def test_bad_fields_are_named(fields: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        GenerateRequest(**fields)
    assert "\n" not in str(error.value)


def test_style_weights() -> None:
    assert style_weights("noto") == {"noto": 1.0}
    assert style_weights("noto:1, twemoji:3") == {"noto": 0.25, "twemoji": 0.75}
    assert style_weights("a,a,b") == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert style_weights("noto：1，twemoji：3") == style_weights("noto:1、twemoji:3") == style_weights("noto:1,twemoji:3")
    with pytest.raises(ValueError, match="did you mean 'noto'"):
        style_weights("notto", ["noto", "twemoji"])


requests = st.builds(
    GenerateRequest,
    prompt=st.none() | st.text(min_size=1, max_size=50).filter(str.strip),
    style=st.none() | st.sampled_from(["noto", "noto:0.5,twemoji:0.5"]),
    seed=st.none() | st.integers(0, 2**31),
    count=st.integers(1, 100),
    steps=st.integers(1, 100),
    guidance=st.floats(0, 20),
    guidance_interval=st.none() | st.just((0.1, 0.9)),
)


@given(requests)
def test_metadata_round_trip(request_: GenerateRequest) -> None:
    record = {"request": request_, "seed": 1, "index": 0, "version": "1", "engine": "e", "device": "cpu", "dtype": "fp32", "threads": 2}
    assert parse_metadata(metadata_text(record | {"model": {"name": "m", "hash": "h"}}))["request"] == request_


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"request": {"stepz": 3}}', '{"request": 3}', "not json"])
def test_foreign_metadata_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"metadata|request"):
        parse_metadata(text)


PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')  # how other programs read the last line


def test_parameters_text_is_read_by_other_programs() -> None:
    request = GenerateRequest(prompt="a cat", negative="a dog", style="noto:0.5,twemoji:0.5", steps=12, guidance=4.5)
    text = parameters_text(request, seed=9, size=(64, 64), model="emoji", model_hash="0123456789abcdef", version="0.1.0")
    lines = text.split("\n")
    assert lines[:2] == ["a cat", "Negative prompt: a dog"]
    values = dict(PAIR.findall(lines[-1]))
    assert values["Steps"] == "12"
    assert values["CFG scale"] == "4.5"
    assert values["Seed"] == "9"
    assert values["Size"] == "64x64"
    assert values["Model hash"] == "0123456789"
    assert values["Style"] == '"noto:0.5,twemoji:0.5"'
    assert len(values) >= 3


def test_no_negative_no_line() -> None:
    text = parameters_text(GenerateRequest(prompt="a\ncat"), seed=0, size=(64, 64), model="m", model_hash="0" * 10, version="1")
    assert text.count("\n") == 1
    assert "Negative" not in text


THEIRS = (
    "a (red:1.2) fox, snow\nNegative prompt: blurry, low quality\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 6.5, Seed: 1234567890, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Clip skip: 2, Variation seed: 7, Variation seed strength: 0.3, "
    'Lora hashes: "a: 1234, b: 5678", Version: v1.6.0'
)


def test_what_another_interface_wrote_is_read() -> None:
    request, found = parse_parameters(THEIRS)
    assert (request.prompt, request.negative) == ("a (red:1.2) fox, snow", "blurry, low quality")
    assert (request.steps, request.sampler, request.schedule, request.guidance) == (25, "dpmpp_2m", "karras", 6.5)
    assert (request.seed, request.width, request.height, request.clip_skip) == (1234567890, 512, 768, 2)
    assert (request.variation, request.variation_seed, request.noise) == (0.3, 7, "a1111")
    assert found["Lora hashes"] == "a: 1234, b: 5678"
    plain, _ = parse_parameters("two\nlines\nSteps: 20, Sampler: Euler a, Schedule type: Exponential, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU")
    assert (plain.prompt, plain.negative, plain.sampler, plain.schedule, plain.noise) == ("two\nlines", None, "ancestral", "lambda", "diffusers")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a fox", "cannot be read"),
        ("a\nSteps: 20, Sampler: DPM adaptive, CFG scale: 7, Seed: 1", r"Sampler \(='DPM adaptive'\) must be one of"),
        ("a\nSteps: 20, Sampler: Euler, Size: 64x64, Model: x", "lack CFG scale"),
    ],
)
def test_parameters_that_cannot_be_read(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_parameters(text)
