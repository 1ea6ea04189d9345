from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sfumato.core.checkpoint import load_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.runlog import read_log
from sfumato.train import sayings
from sfumato.train.loop import checkpoints
from sfumato.train.sayings import EmojiSayings, shortened
from sfumato.train.text import PRESETS, TextRecipe, TextTask, contrastive, preset_smoke, train, whitened


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> TextTask:
    return TextTask(preset_smoke()[0], 0, tmp_path_factory.mktemp("text"))


def test_contrastive_closed_form() -> None:
    """Two pairs of orthogonal directions: -log(e^s / (e^s + 2)) for each row."""
    z = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]])
    positive = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    none = torch.zeros_like(positive)
    scale = torch.tensor(3.0)
    expected = -torch.log(scale.exp() / (scale.exp() + 2))
    torch.testing.assert_close(contrastive(z, positive, none, scale), expected)
    ignored = ~positive
    torch.testing.assert_close(contrastive(z, positive, ignored, scale), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_contrastive_without_positives_is_zero_and_differentiable() -> None:
    z = F.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    loss = contrastive(z, torch.eye(3, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool), torch.tensor(1.0))
    loss.backward()
    assert loss.item() == 0


def test_whitened_features_have_unit_variance_and_no_correlation() -> None:
    x = torch.randn(500, 20, generator=torch.Generator().manual_seed(0)) @ torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    y = whitened(x, 15)
    torch.testing.assert_close(y.T @ y / 499, torch.eye(15), atol=0.05, rtol=0)


def test_batches_are_a_pure_function_of_the_position(task: TextTask) -> None:
    whole = task.batch(np.arange(32))
    parts = [task.batch(np.arange(s, s + 8)) for s in range(0, 32, 8)]
    for key in ("means", "shown", "attributes"):
        assert torch.equal(whole[key], torch.cat([p[key] for p in parts]))


def test_captions_of_one_concept_stand_together(task: TextTask) -> None:
    shown = task.batch(np.arange(32))["shown"]
    n = task.recipe.captions_each
    for start in range(0, 32, n):
        assert float(shown[start : start + n].sum(0).max()) == n


def test_what_is_shown_is_meant(task: TextTask) -> None:
    batch = task.batch(np.arange(64))
    assert bool((batch["means"] >= batch["shown"]).all())


def test_training_teaches_the_names(tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    train(recipe, replace(loop, images=6_400, sample_every=6_400, save_every=6_400), tmp_path)
    log = read_log(tmp_path / "log.jsonl")
    scores = next(line for line in reversed(log) if "names_en" in line)
    assert scores["names_en"] >= 0.9
    assert scores["names_zh"] >= 0.9
    tensors, meta = load_tensors(checkpoints(tmp_path, "model")[-1])
    assert meta["kind"] == "text"
    assert all(k.startswith("text.") for k in tensors)


def test_resume_is_exact(tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    train(recipe, loop, tmp_path / "whole")
    train(recipe, loop, tmp_path / "parts", stop_at=640)
    train(recipe, loop, tmp_path / "parts")
    whole, parts = (load_tensors(checkpoints(tmp_path / n, "state")[-1])[0] for n in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_recipes_round_trip() -> None:
    for preset in PRESETS.values():
        assert from_json(TextRecipe, to_json(preset()[0])) == preset()[0]


def test_a_resume_keeps_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words may change between two versions; the ids that the embeddings were trained with must not."""
    recipe = preset_smoke()[0]
    first = TextTask(recipe, 0, tmp_path).networks["text"].tokenizer.to_str()
    monkeypatch.setattr(EmojiSayings, "corpus", lambda self: ["something else entirely"])
    assert TextTask(recipe, 0, tmp_path).networks["text"].tokenizer.to_str() == first


def test_accumulation_is_refused(tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    with pytest.raises(ValueError, match=r"accumulate \(=2\)"):
        train(recipe, replace(loop, accumulate=2), tmp_path)


@pytest.mark.parametrize("kind", ["own_folder", "own_shards"])
def test_own_captions_are_learned_and_gone_on_with_bit_for_bit(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe, loop = preset_smoke()
    recipe = replace(recipe, data=str(request.getfixturevalue(kind)), limit=0)
    loop = replace(loop, images=2560, save_every=1280, sample_every=1280)
    train(recipe, loop, tmp_path / "whole")
    train(recipe, loop, tmp_path / "halves", stop_at=1280)
    train(recipe, loop, tmp_path / "halves")
    a, b = (load_tensors(checkpoints(tmp_path / n, "state")[-1])[0] for n in ("whole", "halves"))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    scores = [line["captions"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "score" in line]
    assert scores[-1] >= 0.9


def test_a_folder_without_captions_is_refused(own_folder: Path, tmp_path: Path) -> None:
    for text in own_folder.rglob("*.txt"):
        text.write_text("the same")
    with pytest.raises(ValueError, match="has 1 different captions: a text encoder needs two at least"):
        train(replace(preset_smoke()[0], data=str(own_folder), limit=0), preset_smoke()[1], tmp_path / "run")


def test_a_shortened_caption_is_part_of_it() -> None:
    for seed in range(50):
        rng = np.random.default_rng(seed)
        for text, unit in (("a red square on grey paper", str.split), ("一个红色的正方形", list)):
            words = unit(text)
            left = iter(words)
            short = unit(shortened(text, rng))
            assert short
            assert all(w in left for w in short), "in their order"
    assert shortened("two words", np.random.default_rng(0)) == "two words"


def test_of_very_many_captions_the_same_sample_is_taken_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sayings, "MOST_CAPTIONS", 10)
    said = [(f"caption {i % 300}", i) for i in range(900)] + [(None, 900)]
    kept = sayings._sampled(iter(said))
    assert len(kept) == 10
    assert list(kept) == sorted({c for c, _ in said if c}, key=lambda c: hashlib.sha256(c.encode()).digest())[:10]
    assert all(c == f"caption {r % 300}" for c, rows in kept.items() for r in rows)
    assert list(sayings._sampled(reversed(said))) == list(kept)
