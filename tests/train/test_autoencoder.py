from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.core.checkpoint import load_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.images import flatten, to_pil
from sfumato.core.runlog import read_log
from sfumato.data.emoji import STYLES, concepts, is_held_out, pairs
from sfumato.data.folder import scan, split
from sfumato.data.shards import ShardPictures, split_shards
from sfumato.losses.pixels import layers_of, pixel_loss
from sfumato.train.autoencoder import (
    OWN,
    PRESETS,
    AutoencoderRecipe,
    AutoencoderTask,
    preset_smoke,
    psnr_over_white,
    split_pictures,
    train,
)
from sfumato.train.loop import LoopConfig, checkpoints


@pytest.fixture(scope="module")
def task() -> AutoencoderTask:
    return AutoencoderTask(preset_smoke()[0], seed=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke preset, trained to its end."""
    out = tmp_path_factory.mktemp("smoke")
    recipe, loop = preset_smoke()
    train(recipe, replace(loop, device="cpu"), out)
    return out


def premultiplied(seed: int, n: int = 2, size: int = 12) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    alpha = torch.rand(n, 1, size, size, generator=g)
    return torch.cat([torch.rand(n, 3, size, size, generator=g) * alpha, alpha], dim=1) * 2 - 1


# --- a run ------------------------------------------------------------------------------------------------------------------------------------


def test_the_smoke_preset_learns(run: Path) -> None:
    lines = read_log(run / "log.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    scores = [line["psnr"] for line in lines if "psnr" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert len(scores) == 2
    assert scores[1] > scores[0]
    assert list((run / "samples").glob("*.png"))


def test_the_pack_draws(run: Path) -> None:
    tensors, metadata = load_tensors(checkpoints(run, "model")[-1])
    assert metadata["kind"] == "codec"
    codec = Autoencoder(from_json(AutoencoderConfig, metadata["codec"]))
    codec.load_state_dict({k.removeprefix("codec."): v for k, v in tensors.items()})
    assert all(s >= 0 for s in codec.spec.std)
    assert codec.spec.std != (1.0,) * 4, "the latents were measured"
    x = AutoencoderTask(preset_smoke()[0], seed=0).pictures(np.arange(32))
    with torch.no_grad():
        latents = codec.encode(x).mean
        y = codec.decode(latents)
    live = torch.tensor(codec.spec.std) > 0
    assert ((latents.std((0, 2, 3))[live] - 1).abs() < 0.3).all()
    assert psnr_over_white(y, x).mean() > psnr_over_white(torch.zeros_like(x), x).mean()


def test_the_feature_term_joins_late() -> None:
    recipe = replace(preset_smoke()[0], perceptual=0.3, perceptual_from=0.5, perceptual_size=32)
    late = AutoencoderTask(recipe, seed=0)
    batch = late.batch(np.arange(2))
    with torch.no_grad():
        before, stats_before = late.loss(late.networks, batch, 0.49)
        after, stats = late.loss(late.networks, batch, 0.5)
    assert "perceptual" not in stats_before
    torch.testing.assert_close(after, before + 0.3 * stats["perceptual"])
    assert after > before


# --- data -------------------------------------------------------------------------------------------------------------------------------------


def test_pictures_are_a_pure_function_of_the_position(task: AutoencoderTask) -> None:
    positions = np.array([0, 5, 6, 1_000, 77, 5])
    together = task.pictures(positions)
    assert together.shape == (6, 4, 16, 16)
    assert torch.equal(together[1], together[5])
    assert not torch.equal(together[1], together[2])
    torch.manual_seed(4)
    for row, p in enumerate(positions):
        assert (task.pictures(np.array([p]))[0] - together[row]).abs().max() < 1e-6
    again = AutoencoderTask(preset_smoke()[0], seed=0).pictures(positions)
    assert torch.equal(again, together)
    assert not torch.equal(AutoencoderTask(preset_smoke()[0], seed=1).pictures(positions), together)


def test_batches_are_a_pure_function_of_the_position(task: AutoencoderTask) -> None:
    whole = task.batch(np.arange(20, 28))
    parts = [task.batch(p) for p in (np.arange(20, 23), np.arange(23, 28))]
    assert whole.keys() == {"x", "noise", "ground"}
    for key in ("noise", "ground"):
        assert torch.equal(torch.cat([p[key] for p in parts]), whole[key])
    assert (torch.cat([p["x"] for p in parts]) - whole["x"]).abs().max() < 1e-6
    assert whole["noise"].shape == (8, 4, 4, 4)
    assert whole["x"].min() >= -1
    assert whole["x"].max() <= 1


def test_pictures_are_premultiplied_even_where_channels_are_mixed(task: AutoencoderTask) -> None:
    x = (task.pictures(np.arange(64)) + 1) / 2
    assert (x[:, :3] <= x[:, 3:] + 1e-5).all()


def test_held_out_drawings_are_never_trained_on(task: AutoencoderTask) -> None:
    art, held_out = split_pictures("emoji", 8, 40)
    seen = {(concepts()[c].hexcode, STYLES[s]) for c, s in zip(art.concept, art.style, strict=True)}
    kept = {(concepts()[c].hexcode, STYLES[s]) for c, s in zip(held_out.concept, held_out.style, strict=True)}
    assert len(kept) > 3
    assert not any(is_held_out(*p) for p in seen)
    assert all(is_held_out(*p) for p in kept)
    assert seen | kept == {(c.hexcode, s) for c, s in pairs(concepts()[:40])}
    assert not task.train.held_out.any()
    judged = sum(is_held_out(c.hexcode, s) for c, s in pairs(concepts()[:12]))
    assert len(task.exact) == judged > 0


# --- losses and scores ------------------------------------------------------------------------------------------------------------------------


def test_layers_are_over_black_over_white_and_alpha() -> None:
    x = torch.tensor([0.2, 0.1, 0.0, 0.5]).reshape(1, 4, 1, 1) * 2 - 1
    expected = torch.tensor([0.2, 0.1, 0.0, 0.7, 0.6, 0.5, 0.5]) * 2 - 1
    torch.testing.assert_close(layers_of(x).flatten(), expected)


def test_pixel_loss_by_hand() -> None:
    target = torch.zeros(1, 3, 2, 2)
    prediction = target.clone()
    prediction[..., 0, 0] = 0.4
    loss, stats = pixel_loss(prediction, target, mse=2.0, edges=0.5)
    l1, l2, gradient = 0.1, 0.04, 0.2 + 0.2
    assert loss.item() == pytest.approx(l1 + 2.0 * l2 + 0.5 * gradient, rel=1e-5)
    assert stats["l1"].item() == pytest.approx(l1)
    assert stats["l2"].item() == pytest.approx(l2)
    assert pixel_loss(premultiplied(0), premultiplied(0), mse=1.0, edges=1.0)[0] == 0


@given(st.integers(0, 1000))
def test_psnr_is_scikit_images_on_flattened_8_bit_pictures(seed: int) -> None:
    a, b = premultiplied(seed), premultiplied(seed + 1)
    b = a + 0.2 * (b - a)
    u8 = [np.rint(((x[:, :3] + 1) / 2 + (1 - x[:, 3:]) / 2).mul(255).numpy()).astype(np.uint8) for x in (a, b)]
    expected = [peak_signal_noise_ratio(q, p, data_range=255) for p, q in zip(*u8, strict=True)]
    assert psnr_over_white(a, b).tolist() == pytest.approx(expected, abs=0.02)


def test_psnr_agrees_with_what_is_saved_to_disk() -> None:
    """Through PIL's straight alpha and its integer compositing the pictures differ by a level at most."""
    a, b = premultiplied(1, n=4, size=48), premultiplied(2, n=4, size=48)
    flat = [[np.asarray(flatten(i)) for i in to_pil(x)] for x in (a, b)]
    expected = [peak_signal_noise_ratio(q, p, data_range=255) for p, q in zip(*flat, strict=True)]
    assert psnr_over_white(a, b).tolist() == pytest.approx(expected, abs=0.1)


def test_psnr_of_equal_pictures_is_finite_and_high() -> None:
    assert psnr_over_white(premultiplied(0), premultiplied(0)).tolist() == pytest.approx([20 * math.log10(255) + 30] * 2)


# --- settings ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_go_through_json(name: str) -> None:
    recipe, loop = PRESETS[name]()
    assert from_json(AutoencoderRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe
    assert from_json(LoopConfig, json.loads(json.dumps(to_json(loop)))) == loop
    assert recipe.kind == "train-autoencoder"


def test_a_misspelt_setting_is_named() -> None:
    data = to_json(AutoencoderRecipe())
    data["codec"]["convnet"]["widhts"] = [16]
    with pytest.raises(ValueError, match=r"config\.codec\.convnet\.widhts is not a field of ConvnetConfig, did you mean 'widths'\?"):
        from_json(AutoencoderRecipe, data)


def test_the_bundled_codec_is_what_its_docstring_says() -> None:
    recipe, _ = PRESETS["bundled"]()
    codec = Autoencoder(recipe.codec)
    assert sum(p.numel() for p in codec.parameters()) == pytest.approx(6.9e6, rel=0.01)
    with torch.no_grad():
        assert codec.encode(torch.zeros(1, 4, recipe.size, recipe.size)).mean.shape == (1, 16, 8, 8)


# --- one's own pictures ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(own_folder: Path) -> Path:
    return own_folder


@pytest.fixture
def shards(own_shards: Path) -> Path:
    return own_shards


def own(folder: Path, **more: object) -> tuple[AutoencoderRecipe, LoopConfig]:
    recipe, loop = preset_smoke()
    return replace(recipe, data=str(folder), limit=0, variety=OWN, mixed_channels=0.0, **more), replace(loop, device="cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["folder", "shards"])
def test_a_codec_of_ones_own_pictures_learns_and_goes_on_bit_for_bit(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    recipe, loop = own(request.getfixturevalue(where))
    train(recipe, loop, tmp_path / "whole")
    train(recipe, loop, tmp_path / "halves", stop_at=320)
    train(recipe, loop, tmp_path / "halves")
    a, b = (load_tensors(checkpoints(tmp_path / name, "state")[-1])[0] for name in ("whole", "halves"))
    assert all(torch.equal(a[k], v) for k, v in b.items())
    scores = [line["psnr"] for line in read_log(tmp_path / "whole" / "log.jsonl") if "psnr" in line]
    assert scores[-1] > scores[0]


def test_own_pictures_fill_the_canvas_and_none_is_of_both_sides(folder: Path) -> None:
    task = AutoencoderTask(own(folder)[0], seed=0)
    x = task.pictures(np.arange(64))
    assert float(x[:, 3].min()) > 0.99, "what is opaque stays opaque"
    held = 40 - len(task.train)
    assert 1 <= held == len(task.exact)
    assert not {e.digest for e in task.train.entries} & {e.digest for e in split(scan(folder).entries)[1]}  # type: ignore[union-attr]


@pytest.mark.parametrize(("where", "taken", "left"), [("folder", "square/00.png", 39), ("shards", "000000.tar", 31)])
def test_pictures_that_changed_are_refused(where: str, taken: str, left: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(where)
    recipe, loop = own(folder)
    train(recipe, loop, tmp_path / "run", stop_at=32)
    (folder / taken).unlink()
    with pytest.raises(ValueError, match=rf"has changed since .* was begun \(40 pictures then, {left} now\)"):
        train(recipe, loop, tmp_path / "run")


def test_a_codec_may_begin_from_another(folder: Path, run: Path, tmp_path: Path) -> None:
    """It begins where the other ended, and every weight may learn."""
    pack = str(checkpoints(run, "model")[-1])
    recipe, _ = own(folder, init=pack)
    begun = AutoencoderTask(recipe, seed=0).networks["codec"]
    weights = load_tensors(Path(pack))[0]
    assert all(torch.equal(weights[f"codec.{k}"], v) for k, v in begun.state_dict().items())
    assert all(p.requires_grad for p in begun.parameters())
    other = replace(recipe, codec=replace(recipe.codec, bottleneck=replace(recipe.codec.bottleneck, channels=8)))
    with pytest.raises(ValueError, match="must hold a codec of the recipe's shape"):
        AutoencoderTask(other, seed=0)
    with pytest.raises(ValueError, match=r"limit \(=3\) is of the embedded drawings"):
        replace(recipe, limit=3)


# --- shards -----------------------------------------------------------------------------------------------------------------------------------------


def test_shards_give_each_picture_once_an_epoch_and_keep_some_apart(shards: Path) -> None:
    part, held = split_shards(shards, 32, fraction=0.1)
    assert (len(part), len(held)) == (36, 4)
    for epoch in range(2):
        assert sorted(part.shards.order(0, np.arange(36) + 36 * epoch)) == list(range(36))
    names = [{p.shards[i].name for i in range(len(p))} for p in (part, held)]
    assert not names[0] & names[1]
    assert len(names[0] | names[1]) == 40


def test_the_number_of_workers_changes_nothing(shards: Path) -> None:
    part, _ = split_shards(shards, 32)
    rows = torch.tensor([5, 0, 17, 5])
    alone = ShardPictures(part.shards, 32, workers=1)[rows]
    assert torch.equal(alone, ShardPictures(part.shards, 32, workers=7)[rows])
    assert alone.shape == (4, 4, 32, 32)
    assert torch.equal(alone[0], alone[3])
