from __future__ import annotations

import pytest

from sfumato.data.captions import FILLER, HELD_OUT_TEMPLATES, TEMPLATES, TRADITIONAL
from sfumato.text.words import nearest_words, normalise, spell_emoji, unknown_words

KNOWN = ["cat", "cat face", "dog face", "grinning face", "red apple", "dragon", "猫", "狐狸", "狗脸", "青苹果", "t-rex"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("  A  Cat ", "a cat"), ("ＣＡＴ", "cat"), ("STRASSE ß", "strasse ss"), ("❤️", "❤"), ("猫\n狗", "猫 狗"), ("ﬁsh", "fish")],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a cat", []),
        ("two cats and a red apple in a garden", []),
        ("a blue dog, sitting", []),
        ("a hippogriff", ["hippogriff"]),
        ("一只猫", []),
        ("蓝色的狐狸在花园里", []),
        ("一只恐龙", ["恐龙"]),
        ("恐龙和猫", ["恐龙"]),
        ("Cat CAT ＣＡＴ 3", []),
    ],
)
def test_unknown_words(prompt: str, unknown: list[str]) -> None:
    assert [w for w, _ in unknown_words(prompt, KNOWN, filler=FILLER)] == unknown


def test_near_words_are_named_best_first() -> None:
    assert nearest_words("dragn", KNOWN)[0] == "dragon"
    assert nearest_words("grining", KNOWN)[0] == "grinning face"
    assert nearest_words("青萍果", KNOWN)[0] == "青苹果"
    assert nearest_words("qqq", KNOWN) == []


def test_the_words_that_training_puts_around_things_are_known() -> None:
    """Every template around a known thing, held-out ones too, in all scripts."""
    for tongue, thing in (("en", "cat"), ("zh", "猫")):
        for template in (*TEMPLATES[tongue], *HELD_OUT_TEMPLATES[tongue]):
            for text in (template.format(thing), template.format(thing).translate(TRADITIONAL)):
                assert unknown_words(text, KNOWN, filler=FILLER) == [], text


@pytest.mark.parametrize(
    ("prompt", "spelled"),
    [
        ("🐱", "cat face"),
        ("a 🐱 in the snow", "a cat face in the snow"),
        ("一只🐱", "一只猫脸"),
        ("🐱🌧\ufe0f", "cat face cloud with rain"),
        ("🐈\u200d⬛", "black cat"),
        ("a cat", "a cat"),
        ("🦖?", "🦖?"),
        ("猫", "猫"),
    ],
)
def test_emoji_are_spelled_out(prompt: str, spelled: str) -> None:
    names = {"🐱": ("cat face", "猫脸"), "🌧": ("cloud with rain", "雨云"), "🐈": ("cat", "猫"), "🐈\u200d⬛": ("black cat", "黑猫")}
    assert normalise(spell_emoji(prompt, {k: {"en": en, "zh": zh} for k, (en, zh) in names.items()})) == spelled
    assert spell_emoji(prompt, {}) == prompt
