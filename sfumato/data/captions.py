"""Captions in English and Chinese that say what a `Scene` shows, and the words by which each concept is known.

One keyword in ten and two templates per language are kept out of all training, so that the text encoder can be judged on words it never saw.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import numpy as np

from sfumato.data.augment import GROUNDS, Placed, Scene
from sfumato.data.emoji import LANGUAGES, Concept, concepts

SHARED_BY_MANY = 8  # a keyword of more concepts than this ("animal") names a kind of thing, not a thing
PLAIN = 0.35  # how often nothing but the thing itself is said
TEMPLATES = {
    "en": (
        "a picture of {}", "a drawing of {}", "an icon of {}", "an emoji of {}", "an image of {}", "a cartoon of {}", "{}, sticker", "{} emoji",
        "{} icon", "{}, please", "draw {}", "paint {}", "show me {}", "i want {}", "could you draw {}", "make {}", "here is {}", "this is {}",
        "cute {}", "{} in cartoon style",
    ),
    "zh": (
        "{}的图画", "{}的图标", "{}的图片", "{}的卡通画", "一张{}的图片", "一幅{}的画", "{}贴纸", "{}图标", "{}表情", "画{}", "请画{}", "帮我画{}",
        "画一下{}", "给我{}", "给我看{}", "我要{}", "我想要{}", "来{}", "这是{}", "可爱的{}", "生成{}", "卡通风格的{}",
    ),
}  # fmt: skip
HELD_OUT_TEMPLATES = {"en": ("a sticker of {}", "please paint {}"), "zh": ("{}的表情", "给我画{}")}
COLOURS_ZH = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "brown": "棕色", "black": "黑色", "white": "白色", "grey": "灰色",
}  # fmt: skip
GROUNDS_EN = {"garden": "in a garden", "beach": "on a beach", "snow": "in the snow", "sea": "at sea", "desert": "in the desert", "night": "at night",
              "room": "in a room", "sky": "in the sky"}  # fmt: skip
GROUNDS_ZH = {
    "garden": "花园里",
    "beach": "沙滩上",
    "snow": "雪地里",
    "sea": "海上",
    "desert": "沙漠里",
    "night": "夜里",
    "room": "房间里",
    "sky": "天空中",
}
NUMBERS = {2: ("two", "两"), 3: ("three", "三")}
UNCHANGED = ("sheep", "fish", "deer", "bison", "people", "mice", "geese", "rice", "bread", "broccoli")
MANNERS = (
    ("small", 0.4),
    ("tilted", 0.25),
    ("mirrored", 0.1),
    ("left", 0.3),
    ("right", 0.3),
    ("top", 0.3),
    ("bottom", 0.3),
)  # how often each is said
PLACES_EN = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
MANNERS_ZH = {
    "small": "小小的", "tilted": "歪歪的", "mirrored": "镜像的", "left": "左边的", "right": "右边的", "top": "上面的", "bottom": "下面的",
}  # fmt: skip
MEASURES = (  # the first subgroup prefix that fits; what is not named here is counted with 个
    ("animal-marine", "条"), ("animal", "只"), ("cat-face", "只"), ("monkey-face", "只"), ("plant-flower", "朵"), ("plant", "棵"),
    ("transport-ground", "辆"), ("transport-air", "架"), ("transport-water", "艘"), ("place-building", "座"), ("book-paper", "本"),
)  # fmt: skip
TRADITIONAL = str.maketrans(
    "边转镜个只条辆两张红绿蓝黄图画贴纸标请给园滩里间帮来这爱风", "邊轉鏡個隻條輛兩張紅綠藍黃圖畫貼紙標請給園灘裡間幫來這愛風"
)


def folded(word: str) -> str:
    """The form in which words are compared: NFKC, case folded."""
    return unicodedata.normalize("NFKC", word).casefold()


def keyword_held_out(hexcode: str, keyword: str) -> bool:
    """True for the one keyword in ten that no training run may see, in whatever language it is written so."""
    return int(hashlib.sha256(f"{hexcode}/{folded(keyword)}".encode()).hexdigest(), 16) % 10 == 0


@cache
def meanings(language: str) -> dict[str, frozenset[int]]:
    """{word: all concepts that have it as their name or keyword}, lower case."""
    found: dict[str, set[int]] = defaultdict(set)
    for c in concepts():
        for word in (c.names[language], *c.keywords[language]):
            if word:
                found[folded(word)].add(c.index)
    return {w: frozenset(s) for w, s in found.items()}


@cache
def training_keywords(concept: int, language: str) -> tuple[str, ...]:
    """Keywords of a concept that name it fairly and are not held out."""
    c = concepts()[concept]
    return tuple(k for k in _fair(c, language) if not keyword_held_out(c.hexcode, k))


def _fair(c: Concept, language: str) -> list[str]:
    return [k for k in c.keywords[language] if len(meanings(language)[folded(k)]) <= SHARED_BY_MANY]


@cache
def trained_words() -> frozenset[str]:
    """Every word that training may say of a thing, in any language."""
    return frozenset(folded(w) for c in concepts() for t in LANGUAGES for w in (c.names[t], *training_keywords(c.index, t)))


def held_out_keywords(concept: int, language: str) -> tuple[str, ...]:
    """Keywords that training never says, neither of this concept nor of another, in no language."""
    c = concepts()[concept]
    return tuple(k for k in _fair(c, language) if keyword_held_out(c.hexcode, k) and folded(k) not in trained_words())


def word_for(concept: int, language: str, rng: np.random.Generator, keyword_rate: float = 0.35) -> str:
    """The name of a concept, or one of its keywords."""
    c = concepts()[concept]
    keywords = training_keywords(concept, language)
    if keywords and (not c.names[language] or rng.random() < keyword_rate):
        return str(rng.choice(keywords))
    return c.names[language] or c.name


def measure(concept: Concept) -> str:
    return next((m for prefix, m in MEASURES if concept.subgroup.startswith(prefix)), "个")


def article(noun: str) -> str:
    """ "a cat", "an apple", "a unicorn", "an hour"."""
    noun_ = noun.lower()
    vowel = noun_.startswith(("a", "e", "i", "o", "u", "hour", "honest", "heir")) and not noun_.startswith(("uni", "uk", "eu", "use", "one"))
    return f"{'an' if vowel else 'a'} {noun}"


def plural(noun: str) -> str:
    """Good enough for the head of "cat", "red apple", "box", "berry"; a longer phrase is left alone."""
    if " with " in noun or " of " in noun or ":" in noun or noun.endswith(UNCHANGED):
        return noun
    if noun.endswith(("ch", "sh", "x", "z", "ss", "us")):
        return noun + "es"
    if noun.endswith("s"):
        return noun
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2:-1] not in "aeiou" else noun + "s"


def _manner(item: Placed, alone: bool, rng: np.random.Generator) -> list[str]:
    """Which of the words of MANNERS to say; what is seen is not always said."""
    if not alone:
        return []
    side = max(("left", -item.dx), ("right", item.dx), ("top", -item.dy), ("bottom", item.dy), key=lambda s: s[1])
    seen = {"small": item.scale < 0.8, "tilted": abs(item.angle) > 6, "mirrored": item.flip, side[0]: side[1] > 0.05}
    return [m for m, rate in MANNERS if seen.get(m) and rng.random() < rate]


def _english(item: Placed, concept: Concept, word: str, rng: np.random.Generator, alone: bool, number: int = 1) -> str:
    manner = _manner(item, alone, rng)
    adjectives = [m for m in manner if m not in PLACES_EN]
    if "small" in adjectives:
        adjectives[adjectives.index("small")] = str(rng.choice(("small", "little", "tiny")))
    noun = " ".join([*adjectives, *([item.colour] if item.colour else []), word])
    if number > 1:
        return f"{NUMBERS[number][0]} {plural(noun)}"
    noun = article(noun) if not noun.endswith("s") and rng.random() < 0.6 else noun
    return " ".join([noun, *(PLACES_EN[m] for m in manner if m in PLACES_EN)])


def _chinese(item: Placed, concept: Concept, word: str, rng: np.random.Generator, alone: bool, number: int = 1) -> str:
    noun = "".join(MANNERS_ZH[m] for m in _manner(item, alone, rng)) + (f"{COLOURS_ZH[item.colour]}的" if item.colour else "") + word
    if number > 1:
        return f"{NUMBERS[number][1]}{measure(concept)}{noun}"
    return f"一{measure(concept)}{noun}" if rng.random() < 0.4 else noun


def caption(
    scene: Scene, shown: Sequence[int], language: str, rng: np.random.Generator, *, words: Sequence[str] | None = None, unseen: bool = False
) -> str:
    """What a scene shows. `shown` are the concepts of its items; `words` fixes the words for them; `unseen` takes a held-out template."""
    if language not in LANGUAGES:
        raise ValueError(f"language (={language!r}) must be one of {', '.join(LANGUAGES)}")
    if words is None:
        chosen = {c: word_for(c, language, rng) for c in dict.fromkeys(shown)}
        words = [chosen[c] for c in shown]
    tongue = "en" if language == "en" else "zh"
    phrase = _english if tongue == "en" else _chinese
    known = concepts()
    if scene.kind == "count":
        text = phrase(scene.items[0], known[shown[0]], words[0], rng, False, len(scene.items))
    else:
        parts = [phrase(item, known[c], w, rng, scene.kind == "one") for item, c, w in zip(scene.items, shown, words, strict=True)]
        text = (" and " if tongue == "en" else "和").join(parts)
    if scene.ground is not None:
        assert scene.ground in GROUNDS
        living = known[shown[0]].subgroup.startswith("animal") and rng.random() < 0.3
        if tongue == "en":
            text = f"{text} {'sitting ' if living else ''}{GROUNDS_EN[scene.ground]}"
        else:
            text = f"{text}{'坐' if living else ''}在{GROUNDS_ZH[scene.ground]}"
    if unseen or rng.random() >= PLAIN:
        text = str(rng.choice((HELD_OUT_TEMPLATES if unseen else TEMPLATES)[tongue])).format(text)
    return _traditional(text, words) if language == "zh-hant" else text


def _traditional(text: str, words: Sequence[str]) -> str:
    """Translates the template's characters; the words themselves are traditional already."""
    for i, word in enumerate(words):
        text = text.replace(word, f"\0{i}\0")
    text = text.translate(TRADITIONAL)
    for i, word in enumerate(words):
        text = text.replace(f"\0{i}\0", word)
    return text


def any_caption(scene: Scene, shown: Sequence[int], rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    """A training caption in a random language, now and then the bare emoji; also the words it used."""
    language = str(rng.choice(LANGUAGES, p=(0.45, 0.4, 0.15)))
    chosen = {c: word_for(c, language, rng) for c in dict.fromkeys(shown)}
    plain = scene.kind == "one" and scene.items[0].colour is None
    if plain and rng.random() < 0.04:
        return concepts()[shown[0]].emoji, (concepts()[shown[0]].emoji,)
    words = tuple(chosen[c] for c in shown)
    return caption(scene, shown, language, rng, words=words), words


def means(words: Sequence[str], shown: Sequence[int]) -> frozenset[int]:
    """Every concept that one of the words may mean, those shown among them."""
    found = set(shown)
    for word in words:
        for language in LANGUAGES:
            found |= meanings(language).get(folded(word), frozenset())
    return frozenset(found)


def _filler() -> list[str]:
    """The words around the things in captions, in all three scripts, and a few more that say nothing of a thing either."""
    english = " ".join([*TEMPLATES["en"], *HELD_OUT_TEMPLATES["en"], *GROUNDS_EN.values(), *PLACES_EN.values(), *COLOURS_ZH])
    more = "an the and with some photo gray big large small little tiny tilted mirrored sitting one two three left right top bottom"
    found = [*re.findall("[a-z]+", english), *more.split()]
    found += [piece for t in (*TEMPLATES["zh"], *HELD_OUT_TEMPLATES["zh"]) for piece in re.findall(r"[\u4e00-\u9fff]+", t)]
    found += [*COLOURS_ZH.values(), *(v[0] for v in COLOURS_ZH.values()), *GROUNDS_ZH.values(), *MANNERS_ZH.values()]
    found += [*(m for _, m in MEASURES), *(v for _, v in NUMBERS.values()), *"的一二个和与在坐小大里上中画图请着張著", "小小", "给我", "帮我"]
    return list(dict.fromkeys(w for f in found for w in (f, f.translate(TRADITIONAL))))


FILLER = _filler()
