from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sfumato.nn.attention import SHORT, Attention, attend


@pytest.mark.parametrize("n", [5, SHORT // 7 + 1])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_is_softmax_attention(n: int, masked: bool) -> None:
    """Short sequences take another road on the CPU than long ones, to the same place, gradients included."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, m, 8, dtype=torch.float64, generator=g, requires_grad=True) for m in (n, 7, 7))
    allowed = None
    if masked:
        allowed = torch.rand(2, 1, 1, 7, generator=g) > 0.4
        allowed[..., 0] = True
    ours, theirs = attend(q, k, v, allowed), F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    weight = torch.randn(ours.shape, dtype=torch.float64, generator=g)
    a, b = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=1e-10, rtol=0)


def test_masked_context_is_not_seen() -> None:
    torch.manual_seed(0)
    attention = Attention(16, 2, 8)
    x, context = torch.randn(1, 4, 16), torch.randn(1, 5, 8)
    mask = torch.tensor([[True, True, False, False, True]])
    other = context.clone()
    other[:, 2:4] = 100.0
    torch.testing.assert_close(attention(x, context, mask), attention(x, other, mask))
    assert (attention(x, context) - attention(x, other)).abs().max().item() > 1e-3


def test_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="heads"):
        Attention(10, 3)
