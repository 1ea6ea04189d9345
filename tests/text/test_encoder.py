from __future__ import annotations

import pytest
import torch

from sfumato.data.emoji import concepts
from sfumato.text.encoder import START, TextConfig, TextEncoder, train_tokenizer


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    texts = [t for c in concepts()[:200] for t in (c.name, c.names["zh"], *c.keywords["en"])]
    torch.manual_seed(0)
    return TextEncoder(TextConfig(vocabulary=700, width=32, depth=2, heads=2, tokens=12), train_tokenizer(texts, 700)).eval()


def test_every_text_can_be_said(encoder: TextEncoder) -> None:
    """Byte level: nothing is unknown, and what goes in comes out."""
    for text in ("a cat", "一只猫", "🦊", "žů", "\x07"):
        ids, mask = encoder.tokenize([text])
        assert bool(mask.all())
        assert ids[0, 0] == START
        assert encoder.tokenizer.decode(ids[0].tolist()).replace(" ", "") == text.replace(" ", "")


def test_chinese_characters_stand_alone(encoder: TextEncoder) -> None:
    whole = encoder.tokenize(["猫狗"])[0][0, 1:].tolist()
    parts = encoder.tokenize(["猫"])[0][0, 1:].tolist()
    assert whole[: len(parts)] == parts


def test_padding_changes_nothing(encoder: TextEncoder) -> None:
    alone = encoder.encode(["a cat"])
    states, mask, pooled = encoder.encode(["a cat", "a very long sentence about grinning faces and cats"])
    n = alone[0].shape[1]
    torch.testing.assert_close(states[:1, :n], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled[:1], alone[2], atol=1e-5, rtol=0)
    assert int(mask[0].sum()) == n
    assert float(states[0, n:].abs().max()) == 0


def test_long_captions_are_cut(encoder: TextEncoder) -> None:
    states, mask, _ = encoder.encode(["cat " * 100])
    assert states.shape == (1, 12, 32)
    assert bool(mask.all())


def test_the_empty_caption(encoder: TextEncoder) -> None:
    states, mask, pooled = encoder.encode([""])
    assert states.shape[1] == 1
    assert bool(mask.all())
    assert bool(torch.isfinite(pooled).all())


def test_gradients_reach_everything(encoder: TextEncoder) -> None:
    ids, mask = encoder.tokenize(["a cat", "一只狐狸"])
    states, pooled = encoder(ids, mask)
    (states.square().sum() + pooled.square().sum()).backward()
    missing = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    encoder.zero_grad(set_to_none=True)
    assert missing == []
