"""Multi-head attention with normalised queries and keys (arXiv 2302.05442), over itself or over a context."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.nn.embeddings import turned
from sfumato.nn.layers import RMSNorm

SHORT = 64 * 64  # queries x keys up to which plain matrix products beat the CPU's fused kernel, whose backward is slow on short sequences


def attend(
    q: Float[Tensor, "b heads n d"], k: Float[Tensor, "b heads m d"], v: Float[Tensor, "b heads m d"], allowed: Bool[Tensor, "#b #heads #n m"] | None
) -> Float[Tensor, "b heads n d"]:
    """softmax(q k^T / sqrt(d)) v; `allowed` broadcasts to "b heads n m", True where a query may look."""
    if q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > SHORT:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return logits.softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """x attends to itself, or to `context`, where mask is True."""

    def __init__(self, width: int, heads: int, context_width: int | None = None) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width (={width}) must be a multiple of heads (={heads})")
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context_width or width, width, bias=False)
        self.v = nn.Linear(context_width or width, width, bias=False)
        self.out = nn.Linear(width, width)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(
        self, x: Float[Tensor, "b n d"], context: Float[Tensor, "b m e"] | None = None, mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n d"]:
        return self.look(x, *self.seen(x if context is None else context), None if mask is None else mask[:, None, None, :])

    def seen(self, context: Float[Tensor, "b m e"], angles: Float[Tensor, "m d2"] | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values "b heads m d" of what is attended to; `angles` turn the keys by their positions. Worth keeping where queries follow."""
        k, v = (rearrange(f(context), "b m (h d) -> b h m d", h=self.heads) for f in (self.k, self.v))
        k = self.k_norm(k)
        return (k if angles is None else turned(k, angles)), v

    def look(
        self,
        x: Float[Tensor, "b n d"],
        k: Float[Tensor, "b heads m e"],
        v: Float[Tensor, "b heads m e"],
        allowed: Bool[Tensor, "#b #heads #n m"] | None = None,
        angles: Float[Tensor, "n d2"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """What x finds in keys and values; `angles` turn its queries."""
        q = self.q_norm(rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads))
        y = attend(q if angles is None else turned(q, angles), k, v, allowed)
        return self.out(rearrange(y, "b h n d -> b n (h d)"))
