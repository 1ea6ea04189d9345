"""The bundled text encoder: a byte-level BPE and a small bidirectional transformer, for English and Chinese alike.

Token states go to cross-attention, the pooled vector into the time conditioning.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from sfumato.nn.attention import Attention
from sfumato.nn.layers import MLP

PAD, START = 0, 1
CJK = r"[\u3400-\u4dbf\u4e00-\u9fff]"


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`vocabulary` is the largest size of the BPE; captions longer than `tokens` are cut."""

    kind: str = "text"
    vocabulary: int = 6000
    width: int = 256
    depth: int = 3
    heads: int = 4
    tokens: int = 32


def normalise(text: str) -> str:
    """NFKC, case folded, without variation selectors, single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\ufe0f", "")
    return re.sub(r"\s+", " ", text).strip()


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

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Captions -> token states "b n width", mask "b n" (True where a token is) and a pooled vector "b width"."""

    def __init__(self, config: TextConfig, tokenizer: Tokenizer | str) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer.from_str(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.randn(config.tokens, config.width) * 0.02)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.pool = nn.Linear(config.width, config.width)
        nn.init.normal_(self.token.weight, std=0.02)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask "b n", n the longest caption of the batch."""
        rows = [[START, *e.ids][: self.config.tokens] for e in self.tokenizer.encode_batch([normalise(t) for t in texts])]
        longest = max(map(len, rows))
        ids = torch.tensor([r + [PAD] * (longest - len(r)) for r in rows])
        return ids, torch.arange(longest)[None] < torch.tensor([[len(r)] for r in rows])

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.token(ids) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        states = self.norm(x)
        weight = mask[..., None].to(states.dtype)
        return states * weight, self.pool((states * weight).sum(1) / weight.sum(1))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(token states, mask, pooled) for captions, in fp32."""
        device = self.position.device
        ids, mask = (t.to(device) for t in self.tokenize(texts))
        states, pooled = self(ids, mask)
        return states.float(), mask, pooled.float()


def unknown_words(prompt: str, known: Iterable[str], *, filler: Iterable[str] = ()) -> list[tuple[str, list[str]]]:
    """Words of a prompt that no concept is known by, each with the nearest known words by character n-grams.

    `known` are names and keywords, `filler` words that may always stand ("a", "the", colours...). CJK text is covered greedily by known
    words; what stays over is unknown.
    """
    known = {normalise(k) for k in known}
    parts = {w for k in known for w in re.findall(r"[^\W_]+", k)} | {normalise(f) for f in filler}
    parts |= {p + "s" for p in parts if p.isascii()} | {p + "es" for p in parts if p.isascii()}
    found = []
    for word in re.findall(rf"{CJK}+|[^\W_]+", normalise(prompt)):
        if re.match(CJK, word):
            found += _uncovered(word, known | parts)
        elif not word.isdigit() and word not in parts and word not in known:
            found.append(word)
    return [(w, nearest_words(w, known)) for w in dict.fromkeys(found)]


def _uncovered(text: str, known: set[str]) -> list[str]:
    left, i, gap = [], 0, ""
    while i < len(text):
        n = next((n for n in range(len(text) - i, 0, -1) if text[i : i + n] in known), 0)
        if n == 0:
            gap, i = gap + text[i], i + 1
            continue
        left, gap, i = [*left, gap], "", i + n
    return [g for g in [*left, gap] if g]


def ngrams(word: str) -> set[str]:
    padded = f" {word} "
    return {padded[i : i + n] for n in (1, 2, 3) for i in range(len(padded) - n + 1)} - {" "}


def nearest_words(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known words by Jaccard similarity of their character n-grams, best first; only those that share a fair part."""
    own = ngrams(normalise(word))
    scored = [(len(own & g) / len(own | g), k) for k in known for g in [ngrams(k)]]
    best = [k for score, k in sorted(scored, key=lambda s: (-s[0], s[1]))[:count] if score > 0.2]
    return best or difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
