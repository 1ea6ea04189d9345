from __future__ import annotations

import torch

from sfumato.nn.layers import ResBlock, RMSNorm


def test_a_new_block_is_the_identity() -> None:
    x = torch.randn(2, 32, 5, 7)
    assert torch.equal(ResBlock(32)(x), x)


def test_a_block_is_not_the_identity_after_it_learned() -> None:
    block, x = ResBlock(16), torch.randn(2, 16, 4, 4)
    torch.nn.init.normal_(block.conv2.weight)
    assert (block(x) - x).abs().mean() > 0.1


def test_rms_norm() -> None:
    x = torch.randn(3, 5, 8) * 7
    norm = RMSNorm(8)
    with torch.no_grad():
        norm.scale.copy_(torch.arange(8.0))
    expected = x / x.square().mean(-1, keepdim=True).sqrt() * torch.arange(8.0)
    torch.testing.assert_close(norm(x), expected, rtol=1e-5, atol=1e-5)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
