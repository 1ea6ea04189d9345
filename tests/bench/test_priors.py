"""The bench of priors, in seconds: every way is trained, drawn with, looked at and timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.train.autoencoder import AutoencoderRecipe, train
from sfumato.train.loop import LoopConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import priors


@pytest.mark.slow
def test_quick_compares_all_ways(smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = ConvnetConfig(image_channels=3, widths=(16, 16), encoder_blocks=(0, 0), decoder_blocks=(0, 0))
    recipe = AutoencoderRecipe(codec=AutoencoderConfig(convnet=net, bottleneck=VQConfig(size=16, channels=4)), size=16, perceptual=0.0, limit=12)
    train(recipe, LoopConfig(images=64, batch_size=16, warmup=8, save_every=64, sample_every=64, device="cpu"), tmp_path / "vq")
    priors.main(
        ["--quick", "--codec", str(tmp_path / "vq"), "--latents", str(smoke / "codec"), "--text", str(smoke / "text"), "--out", str(tmp_path / "out"),
         "--count", "24", "--repeats", "1"]
    )  # fmt: skip
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    rows = found["details"]["quality"]["rows"]
    assert list(rows) == [*priors.BASELINES, *priors.LEARNED]
    for name, row in rows.items():
        kernel = next(v for k, v in row.items() if k.startswith("kernel distance"))
        assert len(kernel) == 3, name
        assert {"precision", "recall", "seconds a picture, one at a time", "codec alone: kernel distance"} <= row.keys()
    assert (tmp_path / "out" / "priors.png").exists()
    assert {"gpt, cached", "gpt, not cached", "maskgit, 8 steps"} == set(found["details"]["speed"]["batch 1"])
