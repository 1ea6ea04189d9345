"""Codes drawn without looking at each other: by chance, or as often as they were seen. What a learned prior adds is measured against these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.core.seams import Cond
from sfumato.priors.tokens import Vocabulary

Known = Literal["nothing", "counts", "places"]  # any code is as likely; as often as in the whole data; as often as at its place


@dataclass(frozen=True, kw_only=True)
class FrequencyConfig:
    """Hears nothing of what is asked for."""

    kind: str = "frequency"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(codes=1024))
    way: ClassVar[str] = "gpt"
    guided: ClassVar[bool] = False


class Frequency(nn.Module):
    """`counts` "n v" of each token at each position. It has the methods of `sfumato.priors.transformer.Prior` that draw."""

    def __init__(self, config: FrequencyConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("counts", torch.ones(config.vocabulary.length, max(config.vocabulary.slots)))

    def context(self, cond: Cond, batch: int) -> int:
        return batch

    def start_cache(self, context: int) -> None:
        """Nothing is remembered."""

    def next_logits(self, tokens: Int[Tensor, " b"] | None, i: int, context: int, cache: None) -> Float[Tensor, "b v"]:
        return self.counts[i].log().expand(context, -1)  # type: ignore[index]

    def forward(self, tokens: Int[Tensor, "b n"], cond: Cond) -> Float[Tensor, "b n v"]:
        return self.counts.log().expand(len(tokens), -1, -1)  # type: ignore[operator]


def counted(vocabulary: Vocabulary, tokens: Int[Tensor, "m n"], known: Known) -> Frequency:
    """A prior of what was seen in `tokens`."""
    slots, n = vocabulary.slots, vocabulary.length
    counts = torch.zeros(n, max(slots))
    counts.scatter_add_(1, tokens.T.long(), torch.ones(tokens.T.shape))
    for s, size in enumerate(slots):
        here = slice(s, n, len(slots))
        if known == "nothing":
            counts[here] = 0
            counts[here, :size] = 1
        elif known == "counts":
            counts[here] = counts[here].sum(0)
    found = Frequency(FrequencyConfig(vocabulary=vocabulary))
    found.counts.copy_(counts)  # type: ignore[operator]
    return found.eval()
