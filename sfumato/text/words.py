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


def normalise(text: str) -> str:
    """NFKC, case folded, without variation selectors, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\ufe0f", "")
    return re.sub(r"\s+", " ", text).strip()


def unknown_words(prompt: str, known: Iterable[str], *, filler: Iterable[str] = ()) -> list[tuple[str, list[str]]]:
    """Words of a prompt that no concept is known by, each with the nearest known words by character n-grams.

    `known` are names and keywords, `filler` words that may always stand ("a", "the", colours...). CJK text is covered greedily by known
    words; what stays over is unknown. Emoji that nothing is known by are named too. At most MOST_NAMED words are returned.
    """
    known = {normalise(k) for k in known}
    parts = {w for k in known for w in re.findall(r"[^\W_]+", k)} | {normalise(f) for f in filler}
    parts |= {p + "s" for p in parts if p.isascii()} | {p + "es" for p in parts if p.isascii()}
    found = []
    for word in re.findall(rf"{CJK}+|[^\W_]+|{PICTOGRAPH}", normalise(prompt)):
        if re.match(CJK, word):
            found += _uncovered(word, known | parts)
        elif not word.isdigit() and word not in parts and word not in known:
            found.append(word)
    return [(w, nearest_words(w, known)) for w in list(dict.fromkeys(found))[:MOST_NAMED]]


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
