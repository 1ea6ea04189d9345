"""Training codecs with a codebook and a discriminator: stages, gradients, exact resume, and a VAE that draws."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.apps.cli import main
from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.fsq import FSQConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.bottlenecks.residual import ResidualConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.codecs.gaussians import draw_mixture, fit_mixture
from sfumato.codecs.resnets import ResnetConfig
from sfumato.core.checkpoint import FileError, checkpoints, load_tensors, save_tensors
from sfumato.core.config import from_json, to_json
from sfumato.core.runlog import read_log
from sfumato.gans.discriminators import PatchConfig
from sfumato.nn.layers import Activation, Norm
from sfumato.nn.lpips import LPIPS
from sfumato.pipelines.codec import load_codec
from sfumato.train.adversary import Adversary, AdversaryConfig, Controls
from sfumato.train.autoencoder import PRESETS, AutoencoderRecipe, AutoencoderTask, seen_with, train
from sfumato.train.loop import LoopConfig, Trainer

NET = ConvnetConfig(image_channels=3, patch=2, widths=(16, 32), encoder_blocks=(1, 0), decoder_blocks=(0, 1))
HEARD = get_args(get_type_hints(AdversaryConfig)["loss"])
ADVERSARY = AdversaryConfig(weight=0.5, begins=0.4, joins=0.5, ramp=0.2, trusting=0.5, discriminator=PatchConfig(width=16, layers=1))
VQGAN = AutoencoderRecipe(
    codec=AutoencoderConfig(convnet=NET, bottleneck=VQConfig(size=32, channels=4)), size=16, perceptual=0.0, limit=12, adversary=ADVERSARY
)
LOOP = LoopConfig(images=320, batch_size=16, warmup=32, save_every=160, sample_every=160, log_every=32, device="cpu")


@pytest.fixture(scope="module")
def vqgan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    out = tmp_path_factory.mktemp("vqgan")
    return train(VQGAN, LOOP, out), out


def same(a: Path, b: Path) -> None:
    one, two = (load_tensors(checkpoints(p, "state")[-1])[0] for p in (a, b))
    assert one.keys() == two.keys()
    for k in one:
        assert torch.equal(one[k], two[k]), k


# --- stages ---------------------------------------------------------------------------------------------------------------------------------------


def test_each_stage_begins_when_it_should(vqgan: tuple[Trainer, Path]) -> None:
    lines = [line for line in read_log(vqgan[1] / "log.jsonl") if "images_per_s" in line]
    images = {
        "codebook": [line["images"] for line in lines if "codec/commitment" in line],
        "discriminator": [line["images"] for line in lines if "discriminator/loss" in line],
        "heard": [line["images"] for line in lines if "codec/adaptive" in line],
    }
    assert images["codebook"][0] == 64, "made by k-means after 32 pictures, a tenth of the run"
    assert images["discriminator"][0] == 160, "from 0.4 of the run on, in the line that ends at 160"
    assert images["heard"][0] == 192
    weights = [line["codec/adversarial_weight"] / line["codec/adaptive"] for line in lines if line.get("codec/adversarial_weight")]
    assert weights[0] < weights[1] < weights[2]
    assert weights[-1] == pytest.approx(0.5, rel=0.02)


def test_k_means_makes_the_codebook_and_averages_follow(vqgan: tuple[Trainer, Path]) -> None:
    task = AutoencoderTask(VQGAN, seed=0).begin(LOOP)
    trainer = Trainer(task, LOOP, vqgan[1] / "nowhere", VQGAN)
    codec = task.networks["codec"]
    before = codec.bottleneck.codebook.detach().clone()
    trainer.step([task.batch(np.arange(16))])
    assert torch.equal(codec.bottleneck.codebook, before)
    assert not task.controls.fitted
    trainer.step([task.batch(np.arange(16, 32))])
    assert task.controls.fitted, "after 32 pictures, a tenth of the run"
    assert not torch.equal(codec.bottleneck.codebook, before)
    assert torch.equal(trainer.averages["codec"].bottleneck.codebook, codec.bottleneck.codebook)


@pytest.mark.parametrize(
    "bottleneck",
    [
        VQConfig(size=32, channels=4),
        VQConfig(size=32, channels=4, learn="ema", cosine=False, restart=2.0),
        ResidualConfig(levels=2, code=VQConfig(size=16, channels=4, cosine=False, gradient="straight-through")),
        FSQConfig(steps=(4, 4, 4)),
        VQConfig(size=16, channels=4, entropy=0.1),
    ],
)
def test_a_stop_and_a_resume_change_nothing(bottleneck: object, tmp_path: Path) -> None:
    """Stopped before the codebook is made, and again while the discriminator learns."""
    recipe = replace(VQGAN, codec=replace(VQGAN.codec, bottleneck=bottleneck), adversary=replace(ADVERSARY, lecam=0.1))  # type: ignore[arg-type]
    loop = replace(LOOP, images=160, save_every=16, sample_every=80)
    train(recipe, loop, tmp_path / "whole")
    for stop in (16, 80, None):
        train(recipe, loop, tmp_path / "parts", stop_at=stop)
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_resume_drops_what_a_whole_run_drops(tmp_path: Path) -> None:
    """And networks may have other norms and activations, whose statistics are in the state."""
    net = ResnetConfig(
        width=32, multipliers=(1, 2), blocks=1, attention=(), resolution=16, z_channels=4, dropout=0.5, norm="batch", activation="gelu"
    )
    recipe = replace(VQGAN, codec=replace(VQGAN.codec, convnet=net), adversary=AdversaryConfig())
    loop = replace(LOOP, images=96, save_every=16, sample_every=96)
    train(recipe, loop, tmp_path / "whole")
    for stop in (48, None):
        train(recipe, loop, tmp_path / "parts", stop_at=stop)
    same(tmp_path / "whole", tmp_path / "parts")


def test_a_state_that_lost_a_part_of_the_optimiser_is_refused(vqgan: tuple[Trainer, Path], tmp_path: Path) -> None:
    """What no loss had reached is said by the state itself; anything else that is missing is damage."""
    loop = replace(LOOP, save_every=16)
    train(VQGAN, loop, tmp_path, stop_at=16)
    (path,) = checkpoints(tmp_path, "state")
    tensors, metadata = load_tensors(path)
    assert metadata["stateless"]["codec"] == ["codec.bottleneck.codebook"], "the codebook is not made yet"
    lost = {k: v for k, v in tensors.items() if not k.startswith("optimiser.codec.codec.encoder.1.weight")}
    assert len(lost) < len(tensors)
    save_tensors(path, lost, metadata)
    with pytest.raises(FileError, match=r"lacks the optimiser's state of 2 parameters, such as codec\.bottleneck\.codebook: it is damaged"):
        train(VQGAN, loop, tmp_path)


def test_more_discriminator_steps_begin_with_the_discriminator() -> None:
    """Before it learns the codec learns in every step."""
    recipe = replace(VQGAN, adversary=replace(ADVERSARY, steps=3))
    task = AutoencoderTask(recipe, seed=0).begin(LOOP)
    trainer = Trainer(task, LOOP, Path("nowhere"), recipe)
    stepped = []
    for i in range(14):
        found = trainer.step([task.batch(np.arange(16 * i, 16 * i + 16))])
        stepped.append(("codec/loss" in found, "discriminator/loss" in found))
    assert stepped[:8] == [(True, False)] * 8
    assert stepped[8:] == [(i % 3 == 0, True) for i in range(8, 14)]


def test_only_the_decoder_learns_where_it_is_said(vqgan: tuple[Trainer, Path], tmp_path: Path) -> None:
    pack = checkpoints(vqgan[1], "model")[-1]
    recipe = replace(VQGAN, init=str(pack), only="decoder")
    trainer = train(recipe, replace(LOOP, images=64, save_every=64), tmp_path / "fine")
    before, _ = load_tensors(pack)
    for name, value in trainer.task.networks["codec"].state_dict().items():
        changed = not torch.equal(value, before[f"codec.{name}"])
        assert changed == name.startswith("decoder."), name
    with pytest.raises(ValueError, match=r"only \(='decoder'\) needs init"):
        replace(VQGAN, only="decoder")


# --- gradients -------------------------------------------------------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_plain_sum() -> None:
    """Followed back to the pictures once, the losses give the same gradient as they do in one sum."""
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 3, padding=1)).double()
    z, x = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 3, 16, 16).double()
    adversary = Adversary(replace(ADVERSARY, most=5.0), Controls())
    adversary.network.float()
    reconstruction = lambda v: ((v - x).abs().mean(), {})  # noqa: E731
    y = decoder(z)
    loss, found = adversary.hear(y, decoder[2].weight, reconstruction, 0.7)
    found_gradient = torch.autograd.grad(loss, list(decoder.parameters()))
    y = decoder(z)
    near, fooled = (y - x).abs().mean(), -adversary.network(y.float()).mean()
    a, b = (torch.autograd.grad(v, decoder[2].weight, retain_graph=True)[0].norm() for v in (near, fooled))
    weight = float((a / (b + 1e-4)).clamp(0, 5.0))
    assert float(found["adaptive"]) == pytest.approx(weight, rel=1e-4)
    expected = torch.autograd.grad(near + 0.7 * weight * fooled, list(decoder.parameters()))
    for p, q in zip(found_gradient, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert float(loss) == pytest.approx(float(near + 0.7 * weight * fooled), rel=1e-5)


@pytest.mark.parametrize(
    "only",
    [
        {"l1": 1.0}, {"mse": 1.0}, {"charbonnier": 1.0}, {"edges": 1.0}, {"perceptual": 1.0, "perceptual_from": 0.0, "perceptual_size": 32},
        *({"adversary": replace(ADVERSARY, begins=0.0, joins=0.0, ramp=0.0, adaptive=False, loss=kind)} for kind in HEARD),
        {"codebook": 1.0},
    ],
)  # fmt: skip
def test_every_loss_reaches_what_it_should(only: dict) -> None:
    none = {"l1": 0.0, "mse": 0.0, "charbonnier": 0.0, "edges": 0.0, "perceptual": 0.0, "codebook": 0.0, "adversary": AdversaryConfig()}
    task = AutoencoderTask(replace(VQGAN, **{**none, **only}), seed=0).begin(LOOP)
    task.controls.fitted.fill_(True)
    torch.nn.init.normal_(task.networks["codec"].decoder[-2].weight)
    loss, _ = task.loss(task.networks, task.batch(np.arange(4)), 0.9)
    loss.backward()
    reached = {part: any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in getattr(task.networks["codec"], part).parameters())
               for part in ("encoder", "bottleneck", "decoder")}  # fmt: skip
    wanted = (
        {"encoder": True, "bottleneck": True, "decoder": False} if "codebook" in only else {"encoder": True, "bottleneck": False, "decoder": True}
    )
    if "codebook" not in only:
        reached.pop("bottleneck")
        wanted.pop("bottleneck")
    assert reached == wanted


def test_a_discriminator_is_heard_as_far_as_it_is_right() -> None:
    adversary = Adversary(replace(ADVERSARY, trusting=0.7, adaptive=False), Controls())
    y = torch.randn(2, 3, 16, 16, requires_grad=True)
    of_fake = torch.autograd.grad(-adversary.network(y).mean(), y)[0]
    for right, trust in ((0.3, 0.0), (0.5, 0.0), (0.6, 0.5), (0.7, 1.0), (0.9, 1.0)):
        adversary.controls.right.fill_(right)
        loss, found = adversary.hear(y * 1.0, y, lambda v: ((v * 0).sum(), {}), 1.0)
        assert float(found["trust"]) == pytest.approx(trust, abs=1e-5)
        torch.testing.assert_close(torch.autograd.grad(loss, y)[0], trust * of_fake, rtol=1e-4, atol=1e-7)
    adversary.controls.right.fill_(0.5)
    sure = torch.nn.Module()
    sure.forward = lambda x: x.mean((1, 2, 3), keepdim=True)  # type: ignore[method-assign]
    for _ in range(100):
        adversary.judge(sure, torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16))
        adversary.settle(True)
    assert float(adversary.controls.right) == pytest.approx(1, abs=0.01), "a running mean"
    with pytest.raises(ValueError, match=r"trusting \(=0.4\) must be from 0.5 to 1"):
        AdversaryConfig(trusting=0.4)


def test_a_bad_step_leaves_no_trace_in_the_scores() -> None:
    adversary = Adversary(replace(ADVERSARY, lecam=0.1), Controls())
    good, bad = torch.rand(2, 3, 16, 16), torch.full((2, 3, 16, 16), float("nan"))
    adversary.judge(adversary.network, good, bad)
    adversary.settle(False)
    assert adversary.controls.scores.tolist() == [0, 0]
    adversary.judge(adversary.network, good, good)
    adversary.settle(True)
    assert torch.isfinite(adversary.controls.scores).all()
    assert float(adversary.controls.scores.abs().max()) > 0


def test_the_gradient_of_lpips_reaches_the_decoder() -> None:
    """Through the real network, with random weights."""
    recipe = replace(
        VQGAN, l1=0.0, mse=0.0, edges=0.0, codebook=0.0, perceptual=1.0, perceptual_from=0.0, perceptual_size=32, adversary=AdversaryConfig()
    )
    task = AutoencoderTask(recipe, seed=0).begin(LOOP)
    torch.manual_seed(0)
    task.lpips = LPIPS("squeeze").eval().requires_grad_(False)
    for head in task.lpips.heads:
        head.fill_(1.0)
    task.controls.fitted.fill_(True)
    loss, found = task.loss(task.networks, task.batch(np.arange(4)), 0.9)
    loss.backward()
    assert float(loss) == pytest.approx(float(found["perceptual"]))
    assert float(task.networks["codec"].last_weight.grad.abs().max()) > 0  # type: ignore[union-attr]


def test_lpips_looks_at_pictures_in_its_own_range(monkeypatch: pytest.MonkeyPatch) -> None:
    task = AutoencoderTask(replace(VQGAN, perceptual=1.0, perceptual_from=0.0, perceptual_size=32, adversary=AdversaryConfig()), seed=0).begin(LOOP)
    seen: list[torch.Tensor] = []

    class Looks(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            seen.extend((a, b))
            return (a - b).square().mean((1, 2, 3))

    task.lpips = Looks()  # type: ignore[assignment]
    task.controls.fitted.fill_(True)
    loss, _ = task.loss(task.networks, task.batch(np.arange(4)), 0.9)
    loss.backward()
    assert float(seen[1].min()) >= 0
    assert float(seen[1].max()) <= 1
    assert all(p.grad is not None for p in task.networks["codec"].decoder.parameters())


def test_an_adversary_of_a_kl_codec_needs_no_features(tmp_path: Path) -> None:
    recipe = replace(VQGAN, codec=AutoencoderConfig(convnet=NET, bottleneck=KLConfig(channels=4)))
    train(recipe, replace(LOOP, images=64, save_every=64, sample_every=32), tmp_path)
    assert "distance" in next(line for line in read_log(tmp_path / "log.jsonl") if "psnr" in line)


def test_what_a_recipe_cannot_be_is_said() -> None:
    cases = (
        ({"codec": VQGAN.codec, "likelihood": True}, "likelihood needs a kl bottleneck, not vq"),
        ({"codec": replace(VQGAN.codec, convnet=replace(NET, image_channels=4))}, "must be those of the codec"),
        ({"codebook_from": 1.5}, "fractions of the run"),
        ({"codec": AutoencoderConfig(convnet=NET, bottleneck=KLConfig()), "likelihood": True}, "no place for an adversary"),
    )
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            replace(VQGAN, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not learned is not to be heard"):
        AdversaryConfig(begins=0.6, joins=0.5)
    with pytest.raises(ValueError, match="must be a multiple of 32"):
        ResnetConfig(width=48)
    for name, preset in PRESETS.items():
        recipe, _ = preset()
        assert from_json(AutoencoderRecipe, json.loads(json.dumps(to_json(recipe)))) == recipe, name


def test_patience_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    recipe = replace(VQGAN, adversary=AdversaryConfig())
    trainer = train(recipe, replace(LOOP, images=3_200, lr=1e-12, sample_every=32, save_every=1_600, patience=2), tmp_path)
    assert trainer.counters["images"] < 640
    assert (tmp_path / "model-best.safetensors").exists()
    assert checkpoints(tmp_path, "state")


def test_patience_waits_until_all_parts_work(tmp_path: Path) -> None:
    trainer = train(VQGAN, replace(LOOP, images=1_600, lr=1e-12, sample_every=32, save_every=1_600, patience=2), tmp_path)
    assert 0.7 * 1_600 <= trainer.counters["images"] < 0.7 * 1_600 + 160, "the adversarial weight is whole at 0.7"


def test_auto_looks_with_lpips_where_a_backbone_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(VQGAN, features="auto")
    assert seen_with(recipe, tmp_path / "run").features == "lite0"
    monkeypatch.setattr("sfumato.train.autoencoder.lpips_from", lambda: LPIPS("squeeze"))
    assert seen_with(recipe, tmp_path / "run").features == "lpips"
    train(VQGAN, replace(LOOP, images=16), tmp_path / "run")
    assert seen_with(recipe, tmp_path / "run").features == "lite0", "as the run was begun"
    assert seen_with(replace(recipe, features="lite0"), tmp_path / "none").features == "lite0"


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "leaky-relu"])
@pytest.mark.parametrize("net", [NET, ResnetConfig(width=32, multipliers=(1, 2), blocks=1, attention=(8,), resolution=16, z_channels=4)])
def test_norms_and_activations_are_those_asked_for(net: ConvnetConfig | ResnetConfig, norm: Norm, activation: Activation) -> None:
    codec = Autoencoder(replace(VQGAN.codec, convnet=replace(net, norm=norm, activation=activation)))
    kinds = {type(m) for m in codec.modules()}
    norms = {"group": torch.nn.GroupNorm, "batch": torch.nn.BatchNorm2d}
    acts = {"silu": torch.nn.SiLU, "relu": torch.nn.ReLU, "gelu": torch.nn.GELU, "leaky-relu": torch.nn.LeakyReLU}
    assert kinds & set(norms.values()) == ({norms[norm]} if norm in norms else set())
    assert kinds & set(acts.values()) == {acts[activation]}
    codec(torch.zeros(2, 3, 16, 16))[0].sum().backward()
    with pytest.raises(ValueError, match=r"norm \(='layer'\) must be one of"):
        Autoencoder(replace(VQGAN.codec, convnet=replace(net, norm="layer")))
    with pytest.raises(ValueError, match=r"activation \(='tanh'\) must be one of"):
        Autoencoder(replace(VQGAN.codec, convnet=replace(net, activation="tanh")))


# --- a VAE ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    net = AutoencoderConfig(convnet=replace(NET, vector=4), bottleneck=KLConfig(channels=8))
    recipe = AutoencoderRecipe(codec=net, size=16, perceptual=0.0, limit=12, likelihood=True, kl=1.0, kl_warmup=0.3, free_bits=0.02, mixed_channels=0)
    train(recipe, replace(LOOP, images=640), out)
    return out


def test_the_bound_falls_and_is_in_bits(vae: Path) -> None:
    bits = [line["bits"] for line in read_log(vae / "log.jsonl") if "bits" in line and "images_per_s" in line]
    assert bits[-1] < bits[0] - 0.5
    assert 0 < bits[-1] < 10, "eight bits a value would be no model at all"
    looks = [line for line in read_log(vae / "log.jsonl") if "live_channels" in line]
    assert looks[-1]["live_channels"] > 0.5
    assert looks[-1]["score"] == -looks[-1]["bits"]


def test_a_vae_draws_by_itself_and_goes_from_one_picture_to_another(vae: Path, own_folder: Path, tmp_path: Path) -> None:
    codec = load_codec(vae)
    assert codec.codec.encode(torch.zeros(1, 3, 16, 16)).mean.shape == (1, 8, 1, 1)
    for fitted in (True, False):
        images = codec.draw(5, seed=3, fitted=fitted)
        assert len({i.tobytes() for i in images}) == 5
        assert codec.draw(1, seed=5, fitted=fitted)[0].tobytes() == images[2].tobytes(), "picture i has seed + i"
    a, b = sorted(own_folder.rglob("*.png"))[:2]
    way = codec.between(Image.open(a), Image.open(b), 5)
    assert len(way) == 5
    main(["sample", str(vae), "--count", "8", "--out", str(tmp_path / "a.png")])
    main(["sample", str(vae), "--between", str(a), str(b), "--count", "4", "--out", str(tmp_path / "b.png")])
    assert Image.open(tmp_path / "a.png").size[0] > 100
    with pytest.raises(SystemExit):
        main(["sample", str(vae), "--out", str(tmp_path / "a.png")])


def test_a_codec_without_a_prior_says_so(vqgan: tuple[Trainer, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sample", str(vqgan[1]), "--out", str(vqgan[1] / "x.png")])
    assert "does not draw by itself" in capsys.readouterr().err


def test_a_fitted_mixture_has_the_moments_of_what_it_was_fitted_to() -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.cat([torch.randn(400, 4, generator=g) * 0.3 + 3 * torch.eye(4)[i] for i in range(3)])
    prior = fit_mixture(z)
    drawn = torch.stack([draw_mixture(prior, torch.Generator().manual_seed(i)) for i in range(3000)])
    torch.testing.assert_close(drawn.mean(0), z.mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(torch.cov(drawn.T), torch.cov(z.T), rtol=0, atol=0.25)


def test_a_pack_counts_its_codes_and_shows_its_codebook(vqgan: tuple[Trainer, Path]) -> None:
    found = load_codec(vqgan[1]).codebook()
    assert found is not None
    image, use, counts = found
    assert sum(counts) == 512 * 16
    assert counts == sorted(counts, reverse=True)
    assert 0 < use["usage"] <= 1
    assert image.size[0] > 500
