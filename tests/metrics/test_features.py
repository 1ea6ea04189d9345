"""CLIP and DINOv2 through `transformers`, on tiny random models in their layouts: theirs cannot be had offline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, Dinov2Config, Dinov2Model

from sfumato.apps import cli
from sfumato.core.checkpoint import FileError, checkpoints
from sfumato.metrics.features import feature_net, look


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A CLIP of 30 x 30 pixels with a vocabulary of letters."""
    torch.manual_seed(0)
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"), "<|startoftext|>", "<|endoftext|>"]
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {**tiny, "vocab_size": len(letters), "max_position_embeddings": 12, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = CLIPConfig(text_config=words, vision_config={**tiny, "image_size": 30, "patch_size": 10}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(letters)}))
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "clip" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}))
    return tmp_path / "clip"


def test_clip_features_and_words_are_its_own_projections(clip: Path) -> None:
    net = feature_net("clip", str(clip))
    assert (net.side, net.dimensions) == (30, 8)
    x = torch.rand(3, 3, 30, 30, generator=torch.Generator().manual_seed(1))
    model = CLIPModel.from_pretrained(clip).eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIPImageProcessor().image_mean, CLIPImageProcessor().image_std))
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model((x - mean) / std).pooler_output)
        ids = torch.tensor([[52, 2, 0, 45, 53]])  # c a t</w>
        said = model.text_projection(model.text_model(ids).pooler_output)
    torch.testing.assert_close(look(net, x)[0], expected, rtol=1e-5, atol=1e-6)
    assert net.texts is not None
    torch.testing.assert_close(net.texts(["cat"]), said, rtol=1e-5, atol=1e-6)
    assert net.texts(["cat", "a very long text that does not fit at all"]).shape == (2, 8)


def test_dinov2_gives_its_class_token(tmp_path: Path) -> None:
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)).save_pretrained(tmp_path)
    kind = {"image_processor_type": "BitImageProcessor", "crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**kind, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    net = feature_net("dinov2", str(tmp_path))
    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(tmp_path).eval()((x - 0.5) / 0.25).last_hidden_state[:, 0]
    assert net.texts is None
    torch.testing.assert_close(look(net, x)[0], expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be loaded for features"):
        feature_net("clip", str(tmp_path))


def test_an_evaluation_with_clip_says_its_score(clip: Path, smoke: Path, tmp_path: Path) -> None:
    model = str(checkpoints(smoke / "diffusion", "model")[-1])
    argv = ["evaluate", model, "--reference", "emoji", "--count", "8", "--steps", "1", "--metrics", "text,distribution"]
    cli.main([*argv, "--features", "clip", "--features-path", str(clip), "--out", str(tmp_path / "report")])
    figures = json.loads((tmp_path / "report" / "report.json").read_text())["figures"]
    found = {f["name"]: f for f in figures}
    assert 0 <= found["CLIP score"]["value"] <= 100
    assert found["CLIP score"]["interval"][0] <= found["CLIP score"]["value"]
    assert not any(name.startswith("CMMD") for name in found), "that is of one model and one resize only"
    assert not any("FID" in name for name in found)
