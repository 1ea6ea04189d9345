"""The transformer over codes that both ways of writing them share: one token after the other (GPT, LlamaGen, arXiv 2406.06525) or all that are masked
at once (MaskGIT, arXiv 2202.04200). It differs in two things: whether a token sees those that come after it, and what stands at its input.

What is asked for enters as a vector beside every token (pooled text, style, label) and, token by token, through cross-attention or as a prefix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.seams import Cond
from sfumato.nn.attention import Attention
from sfumato.nn.conditions import told
from sfumato.nn.embeddings import Memory, rotary
from sfumato.nn.layers import RMSNorm
from sfumato.priors.tokens import Vocabulary

Way = Literal["gpt", "maskgit"]
MASKED = -1  # of a token that is not known


@dataclass(frozen=True, kw_only=True)
class PriorConfig:
    """A prior over the codes of one codec. `way` gpt sees what was written before, maskgit everything that is known.

    `positions`: learned, and with rotary (2-D) turned by row and column too. `condition`: texts by cross-attention in every `cross_every`-th
    block, or as a prefix of the sequence. `memory`: how many known things the pooled text is compared with. `text_width`, `styles`, `labels` or
    `memory` 0: no such input.
    """

    kind: str = "prior"
    way: Way = "gpt"
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary(codes=1024))
    width: int = 320
    depth: int = 8
    heads: int = 5
    mlp_ratio: float = 8 / 3
    positions: Literal["rotary", "learned"] = "rotary"
    condition: Literal["cross", "prefix"] = "cross"
    cross_every: int = 2
    dropout: float = 0.1
    text_width: int = 256
    styles: int = 6
    labels: int = 0
    memory: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "cross_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.width % (4 * self.heads):
            raise ValueError(f"width (={self.width}) must be a multiple of 4 x heads (={self.heads})")
        if self.memory and not self.text_width:
            raise ValueError(f"memory (={self.memory}) compares texts: it needs text_width > 0, or must be 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout (={self.dropout}) must be from 0 to below 1")


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU, arXiv 2002.05202)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = -(-int(width * ratio) // 16) * 16
        self.gate, self.up, self.down = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Float[Tensor, " *rest d"]) -> Float[Tensor, " *rest d"]:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PriorBlock(nn.Module):
    """Attention over the sequence, over the text (some blocks), and an MLP, each on normalised inputs and added to them."""

    def __init__(self, config: PriorConfig, cross: bool) -> None:
        super().__init__()
        w = config.width
        self.norm1, self.attention = RMSNorm(w), Attention(w, config.heads)
        self.cross_norm = RMSNorm(w) if cross else None
        self.cross = Attention(w, config.heads, config.text_width) if cross else None
        self.norm2, self.mlp = RMSNorm(w), GatedMLP(w, config.mlp_ratio)
        self.dropout = config.dropout

    def drop(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return F.dropout(x, self.dropout, self.training)


@dataclass
class Context:
    """What a sequence is told, ready for every block: `vector` "b d", keys and values of the text with their mask (cross) or a `prefix` "b p d"
    whose mask is "b p".
    """

    vector: Tensor
    mask: Tensor | None = None
    prefix: Tensor | None = None
    seen: list[tuple[Tensor, Tensor] | None] | None = None


@dataclass
class Cache:
    """Keys and values "blocks b heads p+n d" of what was written, made for the whole length at once; `filled` positions are valid."""

    k: Tensor
    v: Tensor
    filled: int = 0


class Prior(nn.Module):
    """net(tokens, Cond) -> logits. See `PriorConfig`; logits of position i are over what its slot chooses from, those beyond it are -inf."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = c = config
        slots, w = c.vocabulary.slots, c.width
        self.tokens = nn.Embedding(sum(slots) + 1, w)  # one row more: masked
        self.slot = nn.Embedding(len(slots), w) if len(slots) > 1 else None
        self.place = nn.Parameter(torch.randn(c.vocabulary.length, w) * 0.02)  # angles alone cannot tell places apart where all is masked
        self.start = nn.Parameter(torch.randn(w) * 0.02) if c.way == "gpt" else None
        if c.text_width:
            self.pooled = nn.Linear(c.text_width, w)
            if c.condition == "prefix":
                self.prefix = nn.Linear(c.text_width, w)
        self.memory = Memory(c.memory, c.text_width, w) if c.memory else None
        if c.styles:  # one row more: no style
            self.style = nn.Embedding(c.styles + 1, w)
            self.style_token = nn.Embedding(c.styles + 1, c.text_width) if c.text_width else None
        if c.labels:  # one row more: no label
            self.label = nn.Embedding(c.labels + 1, w)
        cross = [bool(c.text_width) and c.condition == "cross" and i % c.cross_every == 0 for i in range(c.depth)]
        self.blocks = nn.ModuleList(PriorBlock(c, x) for x in cross)
        self.norm = RMSNorm(w)
        self.heads = nn.ModuleList(nn.Linear(w, size, bias=False) for size in slots)
        firsts = torch.tensor([0, *slots[:-1]]).cumsum(0)
        cells = torch.arange(c.vocabulary.length) // len(slots)
        rows, columns = cells // c.vocabulary.grid[1], cells % c.vocabulary.grid[1]
        self.register_buffer("first", firsts, persistent=False)
        self.register_buffer("cells", torch.stack([rows, columns]) + 1, persistent=False)  # whole numbers: they survive a change of dtype
        self._begin()

    def _begin(self) -> None:
        """Small embeddings; heads and what leaves a block start small, so that a new prior is nearly uniform."""
        for name, p in self.named_parameters():
            if name.startswith(("tokens.", "slot.", "style", "label", "heads.")):
                nn.init.normal_(p, std=0.02)
            elif name.endswith(("out.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / (2 * self.config.depth) ** 0.5)
            elif name.endswith("out.bias"):
                nn.init.zeros_(p)

    # --- what is asked for ------------------------------------------------------------------------------------------------------------------------

    def context(self, cond: Cond, batch: int) -> Context:
        """What blocks need of a condition; made once a sequence."""
        c, like = self.config, self.norm.scale
        vector, states, mask = told(self, cond, like.new_zeros(batch, c.width), like)
        if states is None:
            return Context(vector)
        if c.condition == "prefix":
            return Context(vector, mask=mask, prefix=self.prefix(states))
        return Context(vector, mask=mask, seen=[None if b.cross is None else b.cross.seen(states) for b in self.blocks])

    # --- the sequence -----------------------------------------------------------------------------------------------------------------------------

    def forward(self, tokens: Int[Tensor, "b n"], cond: Cond) -> Float[Tensor, "b n v"]:
        """Logits of every position. gpt: of token i after those before it; maskgit: of all, given those that are not MASKED."""
        self._check(tokens)
        context = self.context(cond, len(tokens))
        x = self._embedded(tokens, context)
        n, p = x.shape[1], 0 if context.prefix is None else context.prefix.shape[1]
        allowed, angles = self._allowed(n, context, x.device), self._angles(p, slice(0, n))
        if context.prefix is not None:
            x = torch.cat([context.prefix, x], dim=1)
        for i, block in enumerate(self.blocks):
            h = block.norm1(x)
            x = x + block.drop(block.attention.look(h, *block.attention.seen(h, angles), allowed, angles))
            x = self._rest(block, i, x, context)
        return self._logits(self.norm(x[:, p:]), range(n))

    def start_cache(self, context: Context) -> Cache:
        """Room for a whole sequence; a prefix is in it already."""
        c, p = self.config, 0 if context.prefix is None else context.prefix.shape[1]
        room = self.norm.scale.new_empty(c.depth, len(context.vector), c.heads, p + c.vocabulary.length, c.width // c.heads)
        cache = Cache(room, torch.empty_like(room))
        if context.prefix is not None:
            assert context.mask is not None
            self._cached(context.prefix, context, cache, self._angles(p, slice(0, 0)), context.mask[:, None, None, :])
        return cache

    def next_logits(self, tokens: Int[Tensor, " b"] | None, i: int, context: Context, cache: Cache) -> Float[Tensor, "b v"]:
        """Logits of token i, given token i - 1 (None for the first); all before that are in the cache."""
        x = self._input(None if tokens is None else tokens[:, None], slice(i, i + 1), context)
        x = self._cached(x, context, cache, self._angles(0, slice(i, i + 1)), self._known_prefix(context, cache.filled + 1))
        return self._logits(self.norm(x), range(i, i + 1))[:, 0]

    def _cached(self, x: Tensor, context: Context, cache: Cache, angles: Tensor | None, allowed: Tensor | None) -> Tensor:
        """Through all blocks, with what is in the cache; adds to it."""
        start, end = cache.filled, cache.filled + x.shape[1]
        for i, block in enumerate(self.blocks):
            h = block.norm1(x)
            cache.k[i, :, :, start:end], cache.v[i, :, :, start:end] = block.attention.seen(h, angles)
            x = x + block.attention.look(h, cache.k[i, :, :, :end], cache.v[i, :, :, :end], allowed, angles)
            x = self._rest(block, i, x, context)
        cache.filled = end
        return x

    def _rest(self, block: PriorBlock, i: int, x: Tensor, context: Context) -> Tensor:
        if block.cross is not None:
            assert block.cross_norm is not None
            assert context.seen is not None
            assert context.mask is not None
            k, v = context.seen[i]  # type: ignore[misc]
            x = x + block.drop(block.cross.look(block.cross_norm(x), k, v, context.mask[:, None, None, :]))
        return x + block.drop(block.mlp(block.norm2(x)))

    def _embedded(self, tokens: Tensor, context: Context) -> Tensor:
        """What stands at each position: gpt what was written before it, maskgit the token itself."""
        if self.config.way == "maskgit":
            return self._input(tokens, slice(0, tokens.shape[1]), context)
        first = self._input(None, slice(0, 1), context).expand(len(tokens), 1, -1)
        if tokens.shape[1] == 1:
            return first
        return torch.cat([first, self._input(tokens[:, :-1], slice(1, tokens.shape[1]), context)], dim=1)

    def _input(self, tokens: Tensor | None, at: slice, context: Context) -> Tensor:
        slots, positions = len(self.heads), torch.arange(at.start, at.stop, device=context.vector.device)
        x = context.vector[:, None]
        if tokens is None:
            x = x + self.start
        else:
            of = (positions if self.config.way == "maskgit" else positions - 1) % slots
            rows = torch.where(tokens == MASKED, self.tokens.num_embeddings - 1, tokens + self.first[of])
            x = x + self.tokens(rows)
        if self.slot is not None:
            x = x + self.slot(positions % slots)
        return x + self.place[at]

    def _angles(self, prefix: int, at: slice) -> Tensor | None:
        """In fp32; those of a prefix, which has no place, are 0."""
        if self.config.positions == "learned":
            return None
        rows, columns = self.cells[:, at].float()
        return F.pad(rotary(rows, columns, self.config.width // self.config.heads), (0, 0, prefix, 0))

    def _known_prefix(self, context: Context, length: int) -> Tensor | None:
        """Whether the keys may be seen: of a prefix those that are texts."""
        if context.prefix is None:
            return None
        assert context.mask is not None
        return F.pad(context.mask, (0, length - context.mask.shape[1]), value=True)[:, None, None, :]

    def _allowed(self, n: int, context: Context, device: torch.device) -> Bool[Tensor, "#b 1 q k"] | None:
        """ "#b 1 p+n p+n": True where a query may look. A prefix sees itself; gpt sees the prefix and what is written before."""
        causal = self.config.way == "gpt"
        if context.prefix is None:
            return torch.ones(n, n, dtype=torch.bool, device=device).tril()[None, None] if causal else None
        p = context.prefix.shape[1]
        seen = torch.ones(p + n, p + n, dtype=torch.bool, device=device)
        if causal:
            seen = seen.tril()
            seen[:p, :p] = True
        return seen & self._known_prefix(context, p + n)  # type: ignore[operator]

    def _logits(self, x: Tensor, at: range) -> Tensor:
        """Each slot by its own head, padded with -inf to the largest."""
        slots, most = self.config.vocabulary.slots, max(self.config.vocabulary.slots)
        if len(slots) == 1:
            return self.heads[0](x).float()
        out = x.new_full((*x.shape[:2], most), -torch.inf, dtype=torch.float32)
        for s, head in enumerate(self.heads):
            here = slice((s - at.start) % len(slots), None, len(slots))
            out[:, here, : slots[s]] = head(x[:, here]).float()
        return out

    def _check(self, tokens: Tensor) -> None:
        if tokens.shape[1] != self.config.vocabulary.length:
            raise ValueError(f"tokens must be 'b {self.config.vocabulary.length}', not of shape {tuple(tokens.shape)}")
