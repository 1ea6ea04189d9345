"""What sfumato says, in the reader's language: English as the code has it, Chinese by a catalogue of the same sentences (`zh.json`).

A sentence of the catalogue may hold gaps, `{}` in English and `{0}`, `{1}`... in Chinese; what stands in a gap is translated too where it is
a sentence of its own. What is not in the catalogue is said in English.
"""

from __future__ import annotations

import json
import locale
import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

LONGEST = 4000  # characters that are looked at
LONGEST_PREFIX = 10
MOST_WORDS = 12  # of a name before a sentence


def language() -> Literal["en", "zh"]:
    """SFUMATO_LANG, else the locale of messages: Chinese where it begins with zh."""
    named = next((v for k in ("SFUMATO_LANG", "LC_ALL", "LC_MESSAGES", "LANG") if (v := os.environ.get(k))), None)
    if named is None:
        named = locale.getlocale()[0] or ""
    return "zh" if named.lower().startswith(("zh", "chinese")) else "en"


@cache
def catalogue() -> dict[str, str]:
    """{English: Chinese}."""
    return json.loads((Path(__file__).parent / "zh.json").read_text(encoding="utf-8"))


@cache
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    """Sentences with gaps: first words that stand before others ("warning: {}"), then those with most words of their own."""

    def first(sentence: str) -> tuple[bool, int]:
        own = sentence.replace("{}", "")
        return not (sentence.endswith(": {}") and len(own) <= LONGEST_PREFIX and sentence.count("{}") == 1), -len(own)

    def pattern(sentence: str) -> re.Pattern[str]:
        gaps = re.escape(sentence).replace(r"\{\}\{\}", r"(.*?)((?:, did you mean .*)?)").replace(r"\{\}", "(.*?)")
        return re.compile(gaps, re.DOTALL)

    return [(pattern(k), catalogue()[k]) for k in sorted((k for k in catalogue() if "{}" in k), key=first)]


def translated(text: str) -> str:
    """`text` in the reader's language, as far as the catalogue has it."""
    if language() == "en" or len(text) > LONGEST:
        return text
    if known := catalogue().get(text):
        return re.sub(r"\{\d\}", "{}", known)  # gaps that are said as they are
    return _chinese(text)


def _chinese(text: str) -> str:
    """The Chinese of a sentence, or the text itself; a name of several words may stand before it ("my cat.png is empty")."""
    spaces = [m.end() for m in re.finditer(" ", text)][:MOST_WORDS]
    for start in (0, *spaces):
        if " " in text[start:] and (said := _sentence(text[start:])) is not None:  # a single word may be anybody's
            return text[:start] + said
    return text


def _sentence(text: str) -> str | None:
    if (exact := catalogue().get(text)) is not None:
        return exact
    for pattern, chinese in _patterns():
        if found := pattern.fullmatch(text):
            return chinese.format(*(_chinese(g) if g else "" for g in found.groups()))
    return None
