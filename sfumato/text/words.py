"""Words: how text is normalised, which words of a prompt are known, and which known ones are near. No torch here."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

MOST_NAMED = 10
CJK = r"[\u3400-\u4dbf\u4e00-\u9fff]"
PICTOGRAPH = "[\U0001f000-\U0001faff\u2600-\u27bf]"


PEOPLE = re.compile(
    r"\b(person|people|humans?|m[ae]n|wom[ae]n|boys?|girls?|child(ren)?|kids?|bab(y|ies)|mother|father|mum|mom|dad|grand(ma|pa|mother|father)"
    r"|bride|groom|king(?! (penguin|crab|cobra))|queen(?! bee)|prince(ss)?"
    r"|portrait|selfie|smiley|doctor|nurse|teacher|student|soldier|police(wo)?man|dancer|singer|wizard|witch)\b"
    "|女人|男人|女孩|男孩|女生|男生|小孩|孩子|儿童|婴儿|宝宝|人物|人像|肖像|老人|老师|学生|医生|护士|公主|王子|国王|女王|妈妈|爸爸|奶奶|爷爷"
    "|情侣|新娘|新郎|笑脸|人脸|美女|帅哥|少女|少年"
)


def of_people(prompt: str, known: Iterable[str] = ()) -> str | None:
    """The first word of a prompt that is of people; None: there is none. It may be a part of something `known` (a baby chick, a woman's hat)."""
    text = normalise(prompt)
    for name in sorted((k for k in map(normalise, known) if k in text and PEOPLE.search(k) and not PEOPLE.fullmatch(k)), key=len, reverse=True):
        text = text.replace(name, " ")
    found = PEOPLE.search(text)
    return found[0] if found else None


def normalise(text: str) -> str:
    """NFKC, case folded, without variation selectors, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\ufe0f", "")
    return re.sub(r"\s+", " ", text).strip()


def unknown_words(prompt: str, known: Iterable[str], *, filler: Iterable[str] = ()) -> list[tuple[str, list[str]]]:
    """Words of a prompt that no concept is known by, each with the nearest known words by character n-grams; at most MOST_NAMED."""
    known = {normalise(k) for k in known}
    return [(w, nearest_words(w, known)) for w in strange_words(prompt, known, filler=filler)[:MOST_NAMED]]


def strange_words(text: str, known: Iterable[str], *, filler: Iterable[str] = ()) -> list[str]:
    """The different words of a text that are not among `known` names and keywords, in their order.

    `filler` are words that may always stand ("a", "the", colours...). CJK text is covered greedily by known words; what stays over is unknown.
    Emoji that nothing is known by are named too.
    """
    known = {normalise(k) for k in known}
    parts = {w for k in known for w in re.findall(r"[^\W_]+", k)} | {normalise(f) for f in filler}
    parts |= {p + "s" for p in parts if p.isascii()} | {p + "es" for p in parts if p.isascii()}
    found = []
    for word in re.findall(rf"{CJK}+|[^\W_]+|{PICTOGRAPH}", normalise(text)):
        if re.match(CJK, word):
            found += _uncovered(word, known | parts)
        elif not word.isdigit() and word not in parts and word not in known:
            found.append(word)
    return list(dict.fromkeys(found))


def _uncovered(text: str, known: set[str]) -> list[str]:
    left, i, gap = [], 0, ""
    while i < len(text):
        n = next((n for n in range(len(text) - i, 0, -1) if text[i : i + n] in known), 0)
        if n == 0:
            gap, i = gap + text[i], i + 1
            continue
        left, gap, i = [*left, gap], "", i + n
    return [g for g in [*left, gap] if g]


def spell_emoji(prompt: str, names: dict[str, dict[str, str]]) -> str:
    """Emoji that have a name, as words: {emoji, normalised: {"en": name, "zh": name}}; in Chinese where the prompt has Chinese in it.

    A text encoder sees an emoji as a few rare bytes and knows it far less well than its name.
    """
    text = normalise(prompt)
    if not names or not re.search(r"[^\x00-\x7f]", text):
        return prompt
    tongue, space = ("zh", "") if re.search(CJK, text) else ("en", " ")
    emoji = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    return emoji.sub(lambda m: f"{space}{names[m[0]][tongue]}{space}", text).strip()


@cache
def ngrams(word: str) -> frozenset[str]:
    """Its runs of one to three characters, with its ends marked by spaces."""
    padded = f" {word} "
    return frozenset(padded[i : i + n] for n in (1, 2, 3) for i in range(len(padded) - n + 1)) - {" "}


def nearest_words(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known words by Jaccard similarity of their character n-grams, best first; only those that share a fair part."""
    own = ngrams(normalise(word))
    scored = [(len(own & g) / len(own | g), k) for k in known for g in [ngrams(k)]]
    best = [k for score, k in sorted(scored, key=lambda s: (-s[0], s[1]))[:count] if score > 0.2]
    return best or difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
