"""What prompts say: weights as AUTOMATIC1111's interface publishes them, parts of 75 tokens, learned words."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.text.clip import ClipConfig, ClipText, usual_tokenizer
from sfumato.text.prompts import BREAK, Ear, heard, weighted

PUBLISHED = (  # of its `parse_prompt_attention`
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
         ("sky", 1.4641000000000006), (".", 1.1)],
    ),
)  # fmt: skip


@pytest.mark.parametrize(("prompt", "expected"), PUBLISHED)
def test_weights_are_the_published_ones(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = weighted(prompt)
    assert [t for t, _ in found] == [t for t, _ in expected]
    assert [w for _, w in found] == pytest.approx([w for _, w in expected])


def test_signs_that_mean_nothing_stay() -> None:
    assert weighted("") == [("", 1.0)]
    assert weighted("a) b] c:2) d: 3") == [("a) b] c:2) d: 3", 1.0)]
    assert weighted("one BREAK two") == [("one", 1.0), (BREAK, -1.0), ("two", 1.0)]
    assert weighted("BREAKFAST") == [("BREAKFAST", 1.0)]
    assert weighted("(a: 1.5 )") == [("a", 1.5)]


@given(st.text(st.sampled_from("ab ()[]:\\1.B,"), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_prompt_is_understood(prompt: str) -> None:
    found = weighted(prompt)
    assert all(isinstance(t, str) and w == w for t, w in found)
    if not set(prompt) & set("()[]\\"):
        assert "".join(t for t, _ in found) == prompt


@pytest.fixture(scope="module")
def ear() -> Ear:
    torch.manual_seed(0)
    config = ClipConfig(width=16, inner=24, depth=2, heads=2)
    network = ClipText(config).eval().requires_grad_(False)
    network.final_layer_norm.bias.fill_(0.3)  # without it states have no mean that could be kept
    return Ear(network, usual_tokenizer(), 49_407)


def test_long_prompts_are_cut_after_a_comma_that_is_near(ear: Ear) -> None:
    words = ", ".join(f"word{chr(97 + i)}" for i in range(26)) + ", " + "last " * 10
    parts = ear.parts(words)
    assert len(parts) == 2
    assert all(len(ids) <= 75 for ids, _ in parts)
    assert parts[0][0][-1] == ear.comma
    whole = [i for ids, _ in parts for i in ids]
    assert whole == ear.tokenizer.encode(words, add_special_tokens=False).ids, "nothing is lost and nothing changes its place"
    assert [len(ids) for ids, _ in ear.parts("x " * 160)] == [75, 75, 10], "without commas they are full"
    assert len(ear.parts("one BREAK two")) == 2


def test_weights_keep_the_mean_and_one_is_nothing(ear: Ear) -> None:
    plain, heavy = heard([ear], ["a red fox"]), heard([ear], ["a (red:1.6) fox"])
    assert torch.equal(heard([ear], ["a (red:1.0) fox"]).text, plain.text)  # type: ignore[arg-type]
    assert not torch.allclose(plain.text, heavy.text)  # type: ignore[arg-type]
    assert float(heavy.text.mean()) == pytest.approx(float(plain.text.mean()), rel=1e-4)  # type: ignore[union-attr]
    ratio = heavy.text / plain.text  # type: ignore[operator]
    assert float((ratio[0, 2] / ratio[0, 1]).mean()) == pytest.approx(1.6, rel=1e-4), "the second word is 1.6 times as strong as the first"


def test_prompts_of_other_lengths_are_heard_together(ear: Ear) -> None:
    both = heard([ear], ["a fox", "x " * 100])
    assert both.text.shape == (2, 154, 16)  # type: ignore[union-attr]
    assert torch.allclose(both.text[0, :77], heard([ear], ["a fox"]).text[0], atol=1e-6)  # type: ignore[index]
    with pytest.raises(ValueError, match=r"clip_skip \(=3\) must be from 1 to 2"):
        heard([ear], ["a"], 3)


def test_learned_words_stand_for_their_vectors(ear: Ear) -> None:
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    ear.learned["my-style"] = vectors
    try:
        ids, _ = ear.parts("in My-Style, not my-styles")[0]
        first = ear.network.config.vocabulary
        assert ids[1:4] == [first, first + 1, first + 2]
        assert sum(i >= first for i in ids) == 3, "only whole names"
        table = torch.cat([ear.network.embeddings.token_embedding.weight, vectors])
        expected = ear.network.hidden(torch.nn.functional.embedding(torch.tensor([ear.filled(ids)]), table))[-1]
        assert torch.allclose(heard([ear], ["in My-Style, not my-styles"]).text, ear.network.final_layer_norm(expected), atol=1e-6)  # type: ignore[arg-type]
        assert max(len(i) for i, _ in ear.parts("x " * 74 + "my-style")) == 74, "vectors of one word stay together"
    finally:
        ear.learned.clear()
