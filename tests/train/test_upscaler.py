"""The enlargement: it begins as bicubic, learns from what the codec draws, and is used where it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sfumato.apps.cli import main
from sfumato.codecs.upscaler import Upscaler, UpscalerConfig
from sfumato.core.checkpoint import checkpoints, load_tensors
from sfumato.core.runlog import read_log
from sfumato.pipelines import load as load_module
from sfumato.pipelines.load import load
from sfumato.train.upscaler import UpscalerTask, lanczos, preset_bundled, preset_smoke, train

EMOJI = Path("emoji")  # the bundled codec: the smoke preset's is too blurred to learn from


@pytest.fixture(scope="module")
def enlarged(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smoke preset on the codec of the smoke model."""
    out = tmp_path_factory.mktemp("upscaler") / "run"
    train(*preset_smoke(), out, codec=smoke / "diffusion")
    return out


@pytest.fixture
def with_enlargement(smoke: Path, enlarged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The smoke model, to which the enlargement is bundled."""
    monkeypatch.setattr(load_module, "bundled", lambda: {"smoke-4x": checkpoints(enlarged, "model")[-1]})
    return checkpoints(smoke / "diffusion", "model")[-1]


def test_it_begins_as_bicubic_and_has_at_most_a_million_parameters() -> None:
    network = Upscaler(UpscalerConfig())
    x = torch.rand(1, 4, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(x), F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False))
    assert sum(p.numel() for p in Upscaler(preset_bundled()[0].upscaler).parameters()) <= 1_000_000


def test_lanczos_is_pillows() -> None:
    picture = np.random.default_rng(0).integers(100, 156, (12, 12), dtype=np.uint8)  # nothing that overshoots and is cut
    ours = lanczos(torch.from_numpy(picture).float()[None, None] / 127.5 - 1, 4)[0, 0]
    theirs = np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.LANCZOS))
    np.testing.assert_allclose((ours.numpy() + 1) * 127.5, theirs, atol=1.0)


def test_it_learns_more_than_lanczos_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    recipe, loop = preset_smoke()
    loop = replace(loop, images=3_200, save_every=1_600, sample_every=3_200)
    train(recipe, loop, tmp_path / "whole", codec=EMOJI)
    train(recipe, loop, tmp_path / "halves", codec=EMOJI, stop_at=1_600)
    train(recipe, loop, tmp_path / "halves", codec=EMOJI)
    a, b = (load_tensors(checkpoints(tmp_path / run, "state")[-1])[0] for run in ("whole", "halves"))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    scores = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if "psnr" in line]
    assert scores[-1]["psnr"] > scores[-1]["lanczos_psnr"]


def test_crops_of_picture_and_target_are_of_the_same_place(tmp_path: Path) -> None:
    recipe = replace(preset_smoke()[0], disturb=0.0)
    task = UpscalerTask(recipe, 0, EMOJI, tmp_path)
    batch = task.batch(np.arange(32))
    assert batch["x"].shape == (32, 4, 8, 8)
    assert batch["y"].shape == (32, 4, 32, 32)
    small = F.avg_pool2d(batch["y"], 4)
    other = torch.roll(small, 1, 0)
    right, wrong = ((batch["x"] - t).square().mean((1, 2, 3)) for t in (small, other))
    assert float(right.mean()) < 0.01
    assert float((right < wrong / 2).float().mean()) > 0.9
    whole = task.batch(np.arange(8))
    assert torch.equal(whole["y"][4:], task.batch(np.arange(4, 8))["y"])


def test_no_held_out_drawing_is_learned_from(smoke: Path, tmp_path: Path) -> None:
    task = UpscalerTask(preset_smoke()[0], 0, smoke / "diffusion", tmp_path)
    assert not task.train.held_out.any()


def test_pictures_are_enlarged_where_the_enlargement_fits(with_enlargement: Path, smoke: Path, tmp_path: Path) -> None:
    model = load(with_enlargement)
    assert model.sizes == [16, 64]
    (large,), (small,) = model.generate("a cat", seed=3, steps=2), model.generate("a cat", seed=3, steps=2, size=16)
    assert (large.size, small.size) == ((64, 64), (16, 16))
    again = np.asarray(large.convert("RGBa").resize((16, 16), Image.Resampling.BOX))
    assert np.corrcoef(again.ravel(), np.asarray(small.convert("RGBa")).ravel())[0, 1] > 0.8, "the same picture, only larger"
    with pytest.raises(ValueError, match=r"size \(=32\) must be 16 or 64"):
        model.generate("a cat", size=32)
    other = load(checkpoints(smoke / "diffusion", "model")[-1])
    assert other.upscaler is not None
    tensors, meta = load_module.load_pack(with_enlargement)
    tensors["codec.decoder.0.weight"] = tensors["codec.decoder.0.weight"] + 0.01
    from sfumato.core.pack import save_pack

    save_pack(tmp_path / "changed.safetensors", tensors, {k: v for k, v in meta.items() if k not in ("hash", "format")})
    assert load(tmp_path / "changed.safetensors").upscaler is None, "it was made for another decoder"


def test_a_mask_keeps_what_lies_outside_to_the_pixel_at_the_large_side(with_enlargement: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "init.png")
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (drawn,) = load(with_enlargement).generate("a cat", seed=3, steps=4, init=str(tmp_path / "init.png"), mask=str(tmp_path / "mask.png"))
    before, after = (np.asarray(i.convert("RGB")) for i in (Image.open(tmp_path / "init.png"), drawn))
    assert np.array_equal(before[:, :32], after[:, :32])
    assert not np.array_equal(before[:, 32:], after[:, 32:])


def test_native_and_from_on_the_command_line(with_enlargement: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(with_enlargement)]
    main(["generate", "a cat", "--seed", "3", "--steps", "2", "--out", str(tmp_path / "a.png"), *model])
    main(["generate", "a cat", "--seed", "3", "--steps", "2", "--native", "--out", str(tmp_path / "b.png"), *model])
    assert [Image.open(tmp_path / f"{n}.png").size for n in "ab"] == [(64, 64), (16, 16)]
    assert "Size: 64x64" in Image.open(tmp_path / "a.png").info["parameters"]
    for name in "ab":
        main(["generate", "--from", str(tmp_path / f"{name}.png"), "--out", str(tmp_path / f"{name}2.png"), *model])
        assert (tmp_path / f"{name}2.png").read_bytes() == (tmp_path / f"{name}.png").read_bytes()
    load_module.bundled = dict  # put back by the fixture
    with pytest.raises(SystemExit):
        main(["generate", "--from", str(tmp_path / "a.png"), "--out", str(tmp_path / "c.png"), *model])
    assert "was not made by the enlargement that is here" in capsys.readouterr().err


def test_from_the_command_line(smoke: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "upscaler", "--preset", "smoke", "--codec", str(smoke / "codec"), "--out", str(tmp_path / "run"), "--loop.images", "64"]
    main([*argv, "--plan"])
    assert '"upscaler"' in capsys.readouterr().out
    main(argv)
    with pytest.raises(SystemExit):
        main([*argv, "--data", str(tmp_path)])
    assert "must be emoji" in capsys.readouterr().err
