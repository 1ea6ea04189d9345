"""The transformer of taming-transformers (minGPT, arXiv 2012.09841), with its names: for checkpoints of that family. It draws as our own GPT does.

What it is told is a token before all others: the class, or a token that stands for none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfumato.core.seams import Cond
from sfumato.nn.attention import attend
from sfumato.priors.tokens import Vocabulary
from sfumato.priors.transformer import Cache


@dataclass(frozen=True, kw_only=True)
class MinGPTConfig:
    """`tokens` it knows, of which the codec has `vocabulary.codes`; `block` positions; `labels` classes, or 0: `start` stands before each picture."""

    kind: str = "mingpt"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(codes=1024, grid=(16, 16)))
    tokens: int = 1024
    block: int = 256
    width: int = 256
    depth: int = 12
    heads: int = 8
    labels: int = 0
    start: int = 0
    way: ClassVar[str] = "gpt"
    guided: ClassVar[bool] = False  # there is no picture of no class to lean on

    def __post_init__(self) -> None:
        if self.width % self.heads or self.vocabulary.length > self.block or self.vocabulary.codes > self.tokens:
            raise ValueError(
                f"width (={self.width}) must be a multiple of heads (={self.heads}), block (={self.block}) at least the {self.vocabulary.length} "
                f"codes of a picture, tokens (={self.tokens}) at least the codebook's {self.vocabulary.codes}"
            )


class MinGPTAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.key, self.query, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))

    def split(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b h n e"]:
        return rearrange(x, "b n (h e) -> b h n e", h=self.heads)


class MinGPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = MinGPTAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class MinGPT(nn.Module):
    """See `sfumato.priors.transformer.Prior`, which has the same methods."""

    def __init__(self, config: MinGPTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.tok_emb = nn.Embedding(c.tokens, c.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, c.block, c.width))
        self.blocks = nn.Sequential(*[MinGPTBlock(c.width, c.heads) for _ in range(c.depth)])
        self.ln_f, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.tokens, bias=False)

    def context(self, cond: Cond, batch: int) -> Int[Tensor, " b"]:
        """The first token of each sequence. Raises ValueError where a class is needed and none is named."""
        first = torch.full((batch,), self.config.start, device=self.pos_emb.device)
        if not self.config.labels:
            return first
        if cond.label is None or bool((cond.label < 0).any()):
            raise ValueError(f"label (=None) must be named: this model draws one of {self.config.labels} classes")
        return cond.label.to(first)

    def start_cache(self, context: Int[Tensor, " b"]) -> Cache:
        c = self.config
        room = self.pos_emb.new_empty(c.depth, len(context), c.heads, c.vocabulary.length, c.width // c.heads)
        return Cache(room, torch.empty_like(room))

    def forward(self, tokens: Int[Tensor, "b n"], cond: Cond) -> Float[Tensor, "b n v"]:
        """Logits of every token after those before it."""
        first = self.context(cond, len(tokens))
        return self._logits(torch.cat([first[:, None], tokens[:, :-1].clamp_min(0)], dim=1), self.start_cache(first))

    def next_logits(self, tokens: Int[Tensor, " b"] | None, i: int, context: Int[Tensor, " b"], cache: Cache) -> Float[Tensor, "b v"]:
        return self._logits((context if tokens is None else tokens)[:, None], cache)[:, -1]

    def _logits(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Through all blocks, after what is in the cache."""
        start, end = cache.filled, cache.filled + tokens.shape[1]
        x = self.tok_emb(tokens) + self.pos_emb[:, start:end]
        allowed = torch.ones(end - start, end, dtype=torch.bool, device=x.device).tril(start)[None, None]
        for i, block in enumerate(self.blocks):
            h, a = block.ln1(x), block.attn
            cache.k[i, :, :, start:end], cache.v[i, :, :, start:end] = a.split(a.key(h)), a.split(a.value(h))
            y = attend(a.split(a.query(h)), cache.k[i, :, :, :end], cache.v[i, :, :, :end], allowed)
            x = x + a.proj(rearrange(y, "b h n e -> b n (h e)"))
            x = x + block.mlp(block.ln2(x))
        cache.filled = end
        return self.head(self.ln_f(x))[..., : self.config.vocabulary.codes].float()
