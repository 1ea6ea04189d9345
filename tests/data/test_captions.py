from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.rng import numpy_rng
from sfumato.data.augment import COLOURS, Placed, Scene, Variety, draw_scene
from sfumato.data.captions import (
    COLOURS_ZH,
    GROUNDS_EN,
    GROUNDS_ZH,
    HELD_OUT_TEMPLATES,
    LANGUAGES,
    TEMPLATES,
    any_caption,
    article,
    caption,
    folded,
    held_out_keywords,
    keyword_held_out,
    meanings,
    means,
    plural,
    training_keywords,
    word_for,
)
from sfumato.data.emoji import concepts

INDEX = {c.name: c.index for c in concepts()}
FULL = Variety(recolour=0.5, count=0.2, pair=0.2, scene=0.3)


def say(scene: Scene, names: list[str], language: str, words: list[str] | None = None, seed: int = 0, **more: bool) -> str:
    return caption(scene, [INDEX[n] for n in names], language, numpy_rng(seed, "test"), words=words, **more)


def every(scene: Scene, names: list[str], language: str, words: list[str]) -> set[str]:
    return {say(scene, names, language, words, seed) for seed in range(200)}


def test_colours_are_said() -> None:
    blue = Scene((Placed(0, colour="blue"),))
    english, chinese = (every(blue, ["cat"], t, [w]) for t, w in (("en", "cat"), ("zh", "猫")))
    assert all("blue cat" in s for s in english)
    assert "a blue cat" in english
    assert all("蓝色的猫" in s for s in chinese)
    assert all("藍色的貓" in s for s in every(blue, ["cat"], "zh-hant", ["貓"]))


def test_what_has_a_colour_in_its_name_is_not_recoloured() -> None:
    for name, may in (("red apple", False), ("light blue heart", False), ("black cat", False), ("cat", True), ("tomato", True)):
        concept = concepts()[INDEX[name]]
        assert concept.may_recolour is may
        scenes = [draw_scene(numpy_rng(i, "x"), FULL, 0, True, may_recolour=concept.may_recolour) for i in range(50)]
        assert any(p.colour for s in scenes for p in s.items) is may


def test_placement_is_said() -> None:
    left = every(Scene((Placed(0, scale=0.75, dx=-0.1),)), ["cat"], "en", ["cat"])
    assert any("on the left" in s for s in left)
    assert any("small" in s or "little" in s or "tiny" in s for s in left)
    assert not any("right" in s or "tilted" in s or "mirrored" in s for s in left)
    turned = every(Scene((Placed(0, angle=9, flip=True, dy=0.1),)), ["cat"], "zh-hant", ["貓"])
    assert all(any(w in s for s in turned) for w in ("歪歪的", "鏡像的", "下面的"))
    assert {say(Scene((Placed(0),)), ["cat"], "en", ["cat"], n).count("small") for n in range(50)} == {0}


def test_numbers_pairs_and_grounds_are_said() -> None:
    cats = Scene((Placed(0), Placed(0)), "count")
    assert all("two cats" in s for s in every(cats, ["cat", "cat"], "en", ["cat", "cat"]))
    assert all("两只猫" in s for s in every(cats, ["cat", "cat"], "zh", ["猫", "猫"]))
    pair = Scene((Placed(0), Placed(1)), "pair")
    assert any("a cat and a dog" in s for s in every(pair, ["cat", "dog"], "en", ["cat", "dog"]))
    assert any("猫和" in s for s in every(pair, ["cat", "dog"], "zh", ["猫", "狗"]))
    garden = Scene((Placed(0, scale=0.6),), "scene", "garden")
    assert all("in a garden" in s for s in every(garden, ["cat"], "en", ["cat"]))
    assert any("坐在花园里" in s for s in every(garden, ["cat"], "zh", ["猫"]))


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("cat", "cats"),
        ("box", "boxes"),
        ("strawberry", "strawberries"),
        ("key", "keys"),
        ("eyes", "eyes"),
        ("bus", "buses"),
        ("ewe sheep", "ewe sheep"),
    ],
)
def test_plurals(noun: str, many: str) -> None:
    assert plural(noun) == many


def test_articles() -> None:
    assert [article(n) for n in ("cat", "apple", "unicorn", "hourglass")] == ["a cat", "an apple", "a unicorn", "an hourglass"]


def test_held_out_templates_never_appear_in_training() -> None:
    scene = Scene((Placed(0),))
    for language, tongue in (("en", "en"), ("zh", "zh")):
        trained = every(scene, ["cat"], language, ["XX"])
        unseen = {say(scene, ["cat"], language, ["XX"], seed, unseen=True) for seed in range(50)}
        assert len(HELD_OUT_TEMPLATES[tongue]) == 2
        assert not set(HELD_OUT_TEMPLATES[tongue]) & set(TEMPLATES[tongue])
        assert trained.isdisjoint(unseen)


def test_held_out_keywords_never_appear_in_training() -> None:
    """Not in another language either: many words are spelt the same in simplified and traditional Chinese."""
    trained = {folded(w) for c in concepts() for t in LANGUAGES for w in (c.names[t], *training_keywords(c.index, t))}
    for language in LANGUAGES:
        held = [(c, k) for c in concepts() for k in held_out_keywords(c.index, language)]
        assert len(held) > 100
        assert all(folded(k) not in trained for _, k in held)
        assert all(keyword_held_out(c.hexcode, k) for c, k in held)


def test_what_training_says_holds_no_held_out_word() -> None:
    held = {folded(k) for c in concepts() for t in LANGUAGES for k in held_out_keywords(c.index, t)}
    said = set()
    for c in concepts()[::7]:
        for seed in range(20):
            rng = numpy_rng(seed, "say", c.index)
            scene = draw_scene(rng, FULL, 0, c.may_flip, may_recolour=c.may_recolour)
            said |= {folded(w) for w in any_caption(scene, [c.index] * len(scene.items), rng)[1]}
    assert not said & held


def test_about_a_tenth_of_the_keywords_is_held_out() -> None:
    flags = [keyword_held_out(c.hexcode, k) for c in concepts() for k in c.keywords["en"]]
    assert 0.08 < sum(flags) / len(flags) < 0.12


def test_words_name_their_concept() -> None:
    for c in concepts()[::50]:
        for seed in range(10):
            word = word_for(c.index, "en", numpy_rng(seed, "word"))
            assert c.index in meanings("en")[folded(word)]
            assert c.index in means([word], [c.index])


@given(st.integers(0, 10_000))
def test_captions_are_deterministic_and_complete(seed: int) -> None:
    rng = numpy_rng(seed, "scene")
    a, b = (int(v) for v in rng.integers(0, len(concepts()), 2))
    scene = draw_scene(rng, FULL, 0, True, [(1, True)])
    shown = [(a, b)[i.drawing] for i in scene.items]
    first, again = (any_caption(scene, shown, numpy_rng(seed, "words")) for _ in range(2))
    assert first == again
    text = first[0]
    assert text.strip() == text != ""
    assert "{" not in text
    assert "\0" not in text
    colour = scene.items[0].colour
    if colour:
        assert colour in text or COLOURS_ZH[colour] in text or COLOURS_ZH[colour][0].translate(str.maketrans("红绿蓝黄", "紅綠藍黃")) in text
    if scene.ground:
        assert GROUNDS_EN[scene.ground] in text or GROUNDS_ZH[scene.ground][0].translate(str.maketrans("园滩", "園灘")) in text


def test_every_colour_has_a_chinese_name() -> None:
    assert set(COLOURS_ZH) == set(COLOURS)


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="language"):
        say(Scene((Placed(0),)), ["cat"], "fr", ["chat"])
