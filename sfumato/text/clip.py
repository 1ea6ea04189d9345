"""The text encoder of CLIP (arXiv 2103.00020, section 2.4), which Stable Diffusion hears with: a causal transformer over byte-pair tokens.

Parts are called as in transformers, without the `text_model.` that its files had up to version 4.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.core.config import at_least

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
LEGACY_END = 2  # what configs of version 1 say where they mean the largest number


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """`tokens` of a text, start and end among them; `projection` numbers of the pooled text (0: it is not projected); `end` is the token at
    which a text is pooled. Defaults are of Stable Diffusion 1.x.
    """

    kind: str = "clip"
    vocabulary: int = 49_408
    width: int = 768
    inner: int = 3072
    depth: int = 12
    heads: int = 12
    tokens: int = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    projection: int = 0
    end: int = 49_407

    def __post_init__(self) -> None:
        at_least(1, **{name: getattr(self, name) for name in ("vocabulary", "width", "inner", "depth", "heads")})
        at_least(2, tokens=self.tokens)
        at_least(0, projection=self.projection)
        if self.width % self.heads:
            raise ValueError(f"width (={self.width}) must be a multiple of heads (={self.heads})")
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation (={self.activation!r}) must be quick_gelu or gelu")


class SelfAttention(nn.Module):
    """Each token looks at itself and at those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = (rearrange(f(x), "b n (h d) -> b h n d", h=self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)"))


class Perceptron(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.quick = config.activation == "quick_gelu"
        self.fc1, self.fc2 = nn.Linear(config.width, config.inner), nn.Linear(config.inner, config.width)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h) if self.quick else F.gelu(h))


class ClipBlock(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(config.width), SelfAttention(config.width, config.heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(config.width), Perceptron(config)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary, config.width)
        self.position_embedding = nn.Embedding(config.tokens, config.width)


class Stack(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ClipBlock(config) for _ in range(config.depth))


class ClipText(nn.Module):
    """net(ids "b n") -> states of every token and a pooled text; what leaves each block is `hidden`."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings, self.encoder = Embeddings(config), Stack(config)
        self.final_layer_norm = nn.LayerNorm(config.width)
        if config.projection:
            self.text_projection = nn.Linear(config.width, config.projection, bias=False)

    def embedded(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Vectors of the tokens, before their places are added: what textual inversion learns others of."""
        return self.embeddings.token_embedding(ids)

    def hidden(self, embedded: Float[Tensor, "b n d"]) -> list[Float[Tensor, "b n d"]]:
        """What enters the first block, and what leaves each. Raises ValueError for too many tokens."""
        n, most = embedded.shape[1], self.config.tokens
        if n > most:
            raise ValueError(f"a text of {n} tokens must have at most {most}: cut it into parts")
        states = [embedded + self.embeddings.position_embedding.weight[:n]]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states

    def pooled(self, last: Float[Tensor, "b n d"], ids: Int[Tensor, "b n"]) -> Float[Tensor, "b p"]:
        """The normed state at the first end of each text, projected where the network has a projection."""
        c = self.config
        at = ids.where(ids < c.vocabulary, 0).argmax(1) if c.end == LEGACY_END else (ids == c.end).int().argmax(1)
        found = self.final_layer_norm(last)[torch.arange(len(ids), device=ids.device), at]
        return self.text_projection(found) if c.projection else found

    def forward(self, ids: Int[Tensor, "b n"], skip: int = 0, normed: bool = True) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b p"]]:
        """States, from `skip` blocks before the last, through the final norm where `normed`; and the pooled text."""
        if not 0 <= skip < self.config.depth:
            raise ValueError(f"skip (={skip}) must be from 0 to below {self.config.depth}, the blocks that the text encoder has")
        states = self.hidden(self.embedded(ids))
        chosen = states[len(states) - 1 - skip]
        return self.final_layer_norm(chosen) if normed else chosen, self.pooled(states[-1], ids)


# --- tokens ---------------------------------------------------------------------------------------------------------------------------------------


def clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Texts -> numbers, without start and end: lower case, words and signs apart, each a byte-pair encoding whose last token ends a word."""
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END, continuing_subword_prefix=""))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens([t for t in (START, END) if t in vocabulary])
    return tokenizer


@cache
def usual_tokenizer() -> Tokenizer:
    """CLIP's own, whose merges come with the package."""
    lines = gzip.decompress((resources.files("sfumato") / "text" / "clip_merges.txt.gz").read_bytes()).decode().split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line)]
    alphabet = _alphabet()
    words = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), START, END]
    return clip_tokenizer({w: i for i, w in enumerate(words)}, merges)


def _alphabet() -> list[str]:
    """A sign for every byte, in the order of CLIP's numbers: printable ones for themselves, the others from code point 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
