"""CLIP's text encoder beside that of transformers, and its tokens beside theirs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.text.clip import ClipConfig, ClipText, usual_tokenizer

SMALL = ClipConfig(vocabulary=99, width=32, inner=48, depth=3, heads=4, tokens=20, end=98)


def both(activation: str, projection: int, end: int) -> tuple[ClipText, torch.nn.Module]:
    """The same weights in both."""
    torch.manual_seed(0)
    config = replace(SMALL, activation=activation, projection=projection, end=end)  # type: ignore[arg-type]
    told = CLIPTextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=20,
        hidden_act=activation, eos_token_id=end, bos_token_id=97, pad_token_id=1, projection_dim=projection or 32,
    )  # fmt: skip
    theirs = (CLIPTextModelWithProjection if projection else CLIPTextModel)(told).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = ClipText(config).eval()
    ours.load_state_dict({k.removeprefix("text_model."): v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    return ours, theirs


@pytest.mark.parametrize("end", [98, 2])
@pytest.mark.parametrize(("activation", "projection"), [("quick_gelu", 0), ("gelu", 24)])
def test_it_hears_what_transformers_hears(activation: str, projection: int, end: int) -> None:
    ours, theirs = both(activation, projection, end)
    ids = torch.randint(3, 97, (3, 20))
    ids[0, 7:], ids[1, 12:], ids[2, 19:] = 98, 98, 98
    if end == 98:
        ids[1, 13:] = 5  # padded with something else
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        states, pooled = ours(ids)
        last = expected.last_hidden_state
        assert torch.allclose(states, last, atol=1e-5)
        assert torch.allclose(pooled, expected.text_embeds if projection else expected.pooler_output, atol=1e-5)
        for skip in range(3):
            assert torch.allclose(ours(ids, skip, normed=False)[0], expected.hidden_states[-1 - skip], atol=1e-5)
        assert torch.allclose(ours(ids, 1)[0], ours.final_layer_norm(expected.hidden_states[-2]), atol=1e-5)


def test_what_it_cannot_hear_is_said() -> None:
    net = ClipText(SMALL)
    with pytest.raises(ValueError, match="a text of 21 tokens must have at most 20"):
        net(torch.zeros(1, 21, dtype=torch.long))
    with pytest.raises(ValueError, match=r"skip \(=3\) must be from 0 to below 3"):
        net(torch.zeros(1, 5, dtype=torch.long), 3)
    with pytest.raises(ValueError, match=r"width \(=32\) must be a multiple of heads \(=5\)"):
        replace(SMALL, heads=5)
    with pytest.raises(ValueError, match=r"activation \(='relu'\) must be quick_gelu or gelu"):
        replace(SMALL, activation="relu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def theirs() -> CLIPTokenizer:
    told = json.loads(usual_tokenizer().to_str())["model"]
    return CLIPTokenizer(vocab=told["vocab"], merges=[tuple(m) for m in told["merges"]])


TEXTS = (
    "a photo of an astronaut riding a horse", "", "  Two   SPACES\tand\nlines ", "it's (very) good, isn't it?!", "naïve café, ÅNGSTRÖM",
    "一只猫 在 下雨", "🦊 emoji 👩‍👩‍👧", "1234567 0.5 v2-1", "<|endoftext|> inside", "supercalifragilisticexpialidocious", "ﬁ ǅ İstanbul",
    "\u200b\u00a0zero",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(theirs: CLIPTokenizer, text: str) -> None:
    assert [49406, *usual_tokenizer().encode(text, add_special_tokens=False).ids, 49407] == theirs(text)["input_ids"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_tokens_of_any_text_are_those_of_transformers(theirs: CLIPTokenizer, text: str) -> None:
    assert [49406, *usual_tokenizer().encode(text, add_special_tokens=False).ids, 49407] == theirs(text)["input_ids"]


def test_tokens_are_the_published_ones() -> None:
    """From the model card of CLIP's authors: `a photo of a cat`."""
    own = usual_tokenizer()
    assert own.get_vocab_size() == 49_408
    assert own.encode("a photo of a cat").ids == [320, 1125, 539, 320, 2368]
    assert own.token_to_id("<|endoftext|>") == 49_407
