"""The bundled text encoder: a byte-level BPE and a small bidirectional transformer, for English and Chinese alike.

Token states go to cross-attention, the pooled vector into the time conditioning.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.attention import Attention
from sfumato.nn.layers import MLP
from sfumato.text.learned import by_names, numbered, with_learned
from sfumato.text.words import CJK, normalise

PAD, START = 0, 1


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`vocabulary` is the largest size of the BPE; captions longer than `tokens` are cut."""

    kind: str = "text"
    vocabulary: int = 6000
    width: int = 256
    depth: int = 3
    heads: int = 4
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.vocabulary < 258:
            raise ValueError(f"vocabulary (={self.vocabulary}) must be at least 258: every byte, padding and start are tokens of their own")
        for name in ("width", "depth", "heads", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} (={getattr(self, name)}) must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width (={self.width}) must be a multiple of heads (={self.heads})")


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE over normalised texts; every CJK character stands alone, so that no phrase becomes one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(CJK), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<pad>", "<start>"], initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator((normalise(t) for t in texts), trainer)
    return tokenizer


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), MLP(width)

    def forward(self, x: Float[Tensor, "b n d"], mask: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Captions -> token states, mask (True where a token is) and a pooled vector. `learned` are vectors "n d" by the names that stand for them."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | str) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer.from_str(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.learned: dict[str, Tensor] = {}
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.pool = nn.Linear(config.width, config.width)
        nn.init.normal_(self.token.weight, std=0.02)

    @property
    def width(self) -> int:
        """Numbers of a token's vector."""
        return self.config.width

    def tokenize(self, texts: Sequence[str]) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
        """ids and mask, n the longest caption of the batch."""
        if self.learned:
            rows = [[START, *self._named(t)][: self.config.tokens] for t in texts]
        else:
            rows = [[START, *e.ids][: self.config.tokens] for e in self.tokenizer.encode_batch([normalise(t) for t in texts])]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (longest - len(r)) for r in rows])
        return ids, torch.arange(longest)[None] < torch.tensor([[len(r)] for r in rows])

    def known(self, words: str) -> tuple[Tensor, list[int]]:
        """The vectors of all tokens, and which of them words are."""
        return self.token.weight, self.tokenizer.encode(plain).ids if (plain := normalise(words)) else []

    def _named(self, text: str) -> list[int]:
        """Tokens of a text with names among its words."""
        tokens, found = numbered(self.learned, self.config.vocabulary), []
        for part, name in by_names(text, self.learned):
            found += tokens[name] if name is not None else self.tokenizer.encode(words).ids if (words := normalise(part)) else []
        return found

    def forward(self, ids: Int[Tensor, "b n"], mask: Bool[Tensor, "b n"]) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b d"]]:
        x = F.embedding(ids, with_learned(self.token.weight, self.learned)) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        states = self.norm(x)
        weight = mask[..., None].to(states.dtype)
        return states * weight, self.pool((states * weight).sum(1) / weight.sum(1))

    def encode(self, texts: Sequence[str]) -> tuple[Float32[Tensor, "b n d"], Bool[Tensor, "b n"], Float32[Tensor, "b d"]]:
        """(token states, mask, pooled) for captions."""
        device = self.position.device
        ids, mask = (t.to(device) for t in self.tokenize(texts))
        states, pooled = self(ids, mask)
        return states.float(), mask, pooled.float()
