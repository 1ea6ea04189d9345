"""Names in texts that stand for learned vectors (textual inversion, arXiv 2208.01618): tokens numbered after the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor


def by_names(text: str, learned: Mapping[str, Tensor]) -> Iterator[tuple[str, str | None]]:
    """(a part of the text, the name that it is, if it is one), in their order; capital letters do not matter."""
    if not learned:
        yield text, None
        return
    names = sorted(learned, key=len, reverse=True)
    known = {n.lower(): n for n in names}
    for part in re.split("(" + "|".join(rf"(?<!\w){re.escape(n)}(?!\w)" for n in names) + ")", text, flags=re.IGNORECASE):
        if part:
            yield part, known.get(part.lower())


def numbered(learned: Mapping[str, Tensor], vocabulary: int) -> dict[str, list[int]]:
    """The tokens of each name."""
    found, at = {}, vocabulary
    for name, vectors in learned.items():
        found[name] = list(range(at, at + len(vectors)))
        at += len(vectors)
    return found


def with_learned(table: Float[Tensor, "v d"], learned: Mapping[str, Tensor]) -> Float[Tensor, "w d"]:
    """The vectors of all tokens, those that were learned after the others."""
    return torch.cat([table, *(v.to(table) for v in learned.values())]) if learned else table
