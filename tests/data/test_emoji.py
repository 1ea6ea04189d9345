from __future__ import annotations

import hashlib
import io
import tarfile
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sfumato.core.images import premultiply
from sfumato.data.emoji import LANGUAGES, STYLES, Concept, Drawings, concepts, drawings, is_held_out, pairs, rasterise, sources, vectors


def named(name: str) -> Concept:
    (found,) = [c for c in concepts() if c.name == name]
    return found


def test_counts() -> None:
    every = pairs(concepts())
    assert len(concepts()) == 1644
    assert len(every) == 9212
    assert sum(is_held_out(c.hexcode, s) for c, s in every) == 445
    assert sum(all(c.hexcode in vectors(s) for s in STYLES) for c in concepts()) >= 1083


def test_every_vector_belongs_to_a_concept() -> None:
    known = {c.hexcode for c in concepts()}
    for style in STYLES:
        assert vectors(style).keys() <= known
    assert sum(len(vectors(s)) for s in STYLES) == 9212


def test_the_hold_out_rule_is_the_hash() -> None:
    """The rule must never move: a pair that was trained on cannot be held out afterwards."""
    for c, s in pairs(concepts()[::97]):
        assert is_held_out(c.hexcode, s) == (int(hashlib.sha256(f"{c.hexcode}/{s}".encode()).hexdigest(), 16) % 20 == 0)
    cat = named("cat").hexcode
    assert [s for s in STYLES if is_held_out(cat, s)] == ["noto"]


def test_names_and_keywords_exist_in_three_languages() -> None:
    assert LANGUAGES == ("en", "zh", "zh-hant")
    for i, c in enumerate(concepts()):
        assert c.index == i
        for tongue in LANGUAGES:
            assert c.names[tongue].strip(), c
            assert c.keywords[tongue], c
            assert all(k.strip() for k in c.keywords[tongue]), c
    assert len({c.hexcode for c in concepts()}) == 1644
    assert (named("fox").names["zh"], named("cat").names["zh-hant"]) == ("狐狸", "貓")


@pytest.mark.parametrize("style", STYLES)
def test_a_sample_of_every_style_rasterises(style: str) -> None:
    codes = sorted(vectors(style))
    for code in np.random.default_rng(7).choice(codes, 24, replace=False):
        rgba = rasterise(vectors(style)[code], 40)
        assert rgba.shape == (40, 40, 4)
        assert rgba.dtype == np.uint8
        assert (rgba[..., :3] <= rgba[..., 3:]).all(), "premultiplied"
        assert rgba[..., 3].max() > 200, f"{code} in {style} is blank"
        assert len(np.unique(rgba.reshape(-1, 4), axis=0)) > 3


def test_a_drawing_that_is_not_square_is_centred() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 20 10"><rect width="20" height="10" fill="#ff0000"/></svg>'
    alpha = rasterise(svg, 16)[..., 3]
    assert alpha[4:12].min() == 255
    assert alpha[:4].max() == alpha[12:].max() == 0


@given(arrays(np.uint8, (3, 4, 4)))
def test_premultiply_rounds_to_nearest(straight: np.ndarray) -> None:
    exact = straight[..., :3].astype(float) * straight[..., 3:] / 255
    ours = premultiply(straight)
    assert np.array_equal(ours[..., 3], straight[..., 3])
    assert np.abs(ours[..., :3] - exact).max() <= 0.5
    assert (ours[..., :3] <= ours[..., 3:]).all()


@pytest.mark.parametrize("style", STYLES)
def test_archives_carry_their_licence(style: str) -> None:
    source = sources()[style]
    with tarfile.open(fileobj=io.BytesIO((resources.files("sfumato.data") / "art" / f"{style}.tar.xz").read_bytes())) as tar:
        notice = tar.extractfile("LICENCE.txt").read().decode()  # type: ignore[union-attr]
    for part in ("attribution", "licence", "home", "package", "version"):
        assert source[part]
        assert source[part] in notice


@pytest.mark.parametrize("name", ["cat", "dog face", "red apple", "fox", "grinning face", "rocket", "spouting whale"])
def test_may_flip(name: str) -> None:
    assert named(name).may_flip


@pytest.mark.parametrize(
    "name", ["right arrow", "left arrow", "backhand index pointing right", "three o’clock", "watch", "musical note", "stop sign", "heart with arrow"]
)
def test_may_not_flip(name: str) -> None:
    assert not named(name).may_flip


@pytest.mark.parametrize("name", ["chart increasing", "chart decreasing", "1st place medal", "2nd place medal", "hundred points", "pool 8 ball"])
def test_may_not_flip_what_would_mean_something_else(name: str) -> None:
    """A rising chart mirrored is a falling one, and digits have a side."""
    assert not named(name).may_flip


def test_drawings_of_a_part() -> None:
    some = drawings(24, concepts()[:3], ("noto", "fluent"))
    assert some.pixels.shape == (len(some), 4, 24, 24)
    assert some.pixels.dtype == torch.uint8
    assert (some.pixels[:, :3] <= some.pixels[:, 3:]).all()
    for i in range(len(some)):
        hexcode, style = concepts()[some.concept[i]].hexcode, STYLES[some.style[i]]
        assert np.array_equal(some.pixels[i].permute(1, 2, 0).numpy(), rasterise(vectors(style)[hexcode], 24))
        assert some.held_out[i] == is_held_out(hexcode, style)


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_rows_keep_pixels_and_labels_together(keep: list[bool]) -> None:
    art = small_art()
    kept = art.rows(np.array(keep))
    which = np.flatnonzero(keep)
    assert len(kept) == len(which)
    assert torch.equal(kept.pixels, art.pixels[which])
    assert np.array_equal(kept.concept, art.concept[which])
    assert np.array_equal(kept.style, art.style[which])


def small_art() -> Drawings:
    return Drawings(torch.arange(6 * 4, dtype=torch.uint8).reshape(6, 4, 1, 1), np.arange(6), np.arange(6) % 3)


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match=r"style \(='oil'\) must be one of twemoji, noto"):
        vectors("oil")
