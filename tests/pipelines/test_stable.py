"""What is asked of a checkpoint of Stable Diffusion, and what it refuses: sizes, passes, edges, noise, LoRAs, learned words, conversions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.apps.cli import main
from sfumato.codecs.tiny import TinyAutoencoder, TinyConfig
from sfumato.convert.stable import read_checkpoint
from sfumato.core.checkpoint import FileError
from sfumato.core.request import GenerateRequest, parse_metadata
from sfumato.core.rng import Philox
from sfumato.pipelines import load as loading
from sfumato.pipelines.codec import load_codec
from sfumato.pipelines.load import load
from sfumato.pipelines.stable_diffusion import StableDiffusion, seamless, starts, tiled

REQUEST = GenerateRequest(prompt="a fox", seed=3, steps=2, width=64, height=64)


@pytest.fixture(scope="module")
def model(stable: Path) -> StableDiffusion:
    found = load(stable / "sd15.safetensors", device="cpu")
    assert isinstance(found, StableDiffusion)
    return found


def image(model: StableDiffusion, request: GenerateRequest) -> np.ndarray:
    (picture,) = model.pictures(request)
    return np.asarray(picture.image).astype(float)


def test_any_size_and_two_passes(model: StableDiffusion) -> None:
    assert image(model, replace(REQUEST, width=96, height=40)).shape == (40, 96, 3)
    seen: list[tuple[int, int]] = []
    (picture,) = model.pictures(replace(REQUEST, hires=1.5, hires_strength=0.5), progress=lambda done, total: seen.append((done, total)))
    assert picture.image.size == (96, 96)
    assert seen[-1] == (3, 3), "two steps, and half of two"
    with pytest.raises(ValueError, match=r"width \(=63\) must be a multiple of 8: the nearest are 56 and 64"):
        model.check(replace(REQUEST, width=63))


def test_the_same_request_is_the_same_picture_and_its_png_says_it(model: StableDiffusion) -> None:
    request = replace(REQUEST, count=2)
    a, b = (list(model.pictures(request)) for _ in range(2))
    assert [p.png() for p in a] == [p.png() for p in b]
    assert "Size: 64x64" in a[0].parameters
    record = parse_metadata(json.dumps({"version": "0", **json.loads(_text(a[0].png()))}))
    assert record["request"].guidance == 7.5
    assert record["request"].sampler == "dpmpp_2m"


def _text(png: bytes) -> str:
    import io

    with Image.open(io.BytesIO(png)) as found:
        return str(found.text["sfumato"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a (fox:1.5)"}, {"negative": "snow"}, {"guidance": 2.0}, {"clip_skip": 2}, {"guidance_rescale": 0.9}, {"apg": 0.0}, {"tiling": True},
     {"variation": 0.5, "variation_seed": 9}, {"schedule": "trailing"}, {"sampler": "plms"}, {"noise": "diffusers"}, {"noise": "a1111"},
     {"prompt": "a fox, " + "in the snow, " * 40}],
    ids=lambda c: "-".join(c),
)  # fmt: skip
def test_everything_that_is_said_counts(change: dict[str, object], model: StableDiffusion) -> None:
    least = 0.0 if "apg" in change else 0.02  # a random network's guidance hardly pushes along the picture
    assert np.abs(image(model, replace(REQUEST, **change)) - image(model, REQUEST)).mean() > least  # type: ignore[arg-type]


def test_opposite_edges_fit_together(model: StableDiffusion) -> None:
    """Rolled noise gives the rolled picture only where nothing ends at an edge."""
    from sfumato.pipelines.stable_diffusion import seamless

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), seamless([model.codec], True):
        one, other = model.codec.decode(x), model.codec.decode(x.roll(4, 3))
    assert torch.allclose(one.roll(32, 3), other, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model.codec.decode(x).roll(32, 3), model.codec.decode(x.roll(4, 3)), atol=1e-2)


def test_tiles_leave_no_seams() -> None:
    """A decoder without neighbours is the same in tiles; every cell is in one."""
    z = torch.randn(2, 4, 70, 50, generator=torch.Generator().manual_seed(0))
    decode = lambda z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)  # noqa: E731
    assert torch.allclose(tiled(decode, z, 8, side=32, overlap=8), decode(z), atol=1e-5)
    for length in (10, 32, 33, 56, 57, 200):
        found = starts(length, 32, 8)
        assert found[0] == 0
        assert max(found) + 32 >= length
        assert all(b - a <= 24 for a, b in pairwise(found))


def test_masks_keep_what_they_do_not_show_and_pictures_grow(model: StableDiffusion, stable: Path, tmp_path: Path) -> None:
    photo = Image.open(stable / "photo.png").resize((64, 64))
    photo.save(tmp_path / "photo.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    mask.save(tmp_path / "mask.png")
    request = GenerateRequest(prompt="a fox", seed=3, steps=2, init=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"), strength=1.0)
    found = image(model, request)
    assert np.array_equal(found[:, :32], np.asarray(photo)[:, :32])
    assert not np.array_equal(found[:, 32:], np.asarray(photo)[:, 32:])
    grown = image(model, replace(request, mask=None, extend=(16, 0, 16, 8)))
    assert grown.shape == (72, 96, 3)
    assert np.array_equal(grown[:64, 16:80], np.asarray(photo))
    large = dataclasses.replace(model, meta=model.meta | {"size": 64})
    grown = image(large, replace(request, mask=None, extend=(16, 0, 16, 8)))
    assert np.array_equal(grown[:64, 16:80], np.asarray(photo)), "also where the sheet is larger than what the model learned"


def test_loras_and_learned_words_leave_nothing_behind(model: StableDiffusion, stable: Path) -> None:
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    plain = image(model, REQUEST)
    request = replace(REQUEST, lora=(f"{stable / 'style.safetensors'}:0.8",))
    (picture,) = model.pictures(request)
    assert np.abs(np.asarray(picture.image).astype(float) - plain).mean() > 0.02
    assert list(picture.record["files_sha256"]) == [str(stable / "style.safetensors")]
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    words = replace(REQUEST, prompt="a fox in my-style", embedding=(str(stable / "my-style.pt"),))
    assert np.abs(image(model, words) - image(model, replace(words, embedding=()))).mean() > 0.02
    assert np.array_equal(image(model, REQUEST), plain)
    assert model.ears[0].learned == {}
    save_file({"emb_params": torch.zeros(1, 7)}, stable / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"has vectors of \[7\] numbers, and this model's text encoders of \[64\]"):
        image(model, replace(request, embedding=(str(stable / "wrong.safetensors"),)))
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items()), "what was merged before the error is out again"


def test_noise_is_whose_it_is_said_to_be(model: StableDiffusion) -> None:
    (row,) = model._rows(replace(REQUEST, noise="a1111"))
    assert np.array_equal(model._stream(row, None).first.numpy(), Philox(3).normal(4, 8, 8))
    (row,) = model._rows(replace(REQUEST, noise="diffusers"))
    expected = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(model._stream(row, None).first, expected)
    (row,) = model._rows(replace(REQUEST, noise="a1111", variation=1.0, variation_seed=5))
    assert np.allclose(model._stream(row, None).first.numpy(), Philox(5).normal(4, 8, 8), atol=1e-5)


@pytest.fixture
def sees(model: StableDiffusion) -> Iterator[list[int]]:
    steps: list[int] = []
    watch = lambda i, x0: steps.append(i)  # noqa: E731
    model.watchers.append(watch)
    yield steps
    model.watchers.remove(watch)


def test_a_preview_is_asked_after_every_step(model: StableDiffusion, sees: list[int]) -> None:
    image(model, REQUEST)
    assert sees == [0, 1]


def test_another_autoencoder(stable: Path, tmp_path: Path) -> None:
    whole = load_file(stable / "sd15.safetensors")
    vae = {k.removeprefix("first_stage_model."): v for k, v in whole.items() if k.startswith("first_stage_model.")}
    vae["decoder.conv_out.bias"] = vae["decoder.conv_out.bias"] + 0.5
    save_file(vae, tmp_path / "vae.safetensors")
    one, other = load(stable / "sd15.safetensors", device="cpu"), load(stable / "sd15.safetensors", device="cpu", vae=tmp_path / "vae.safetensors")
    assert image(other, REQUEST).mean() > image(one, REQUEST).mean() + 20  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vae \(=.*\) must be left out"):
        load("emoji", vae=tmp_path / "vae.safetensors")


@pytest.fixture(scope="module")
def weaker(stable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with another UNet."""
    torch.manual_seed(9)
    tensors = load_file(stable / "sd15.safetensors")
    file = tmp_path_factory.mktemp("weaker") / "weaker.safetensors"
    save_file({k: v + 0.05 * torch.randn_like(v) if k.startswith("model.") else v for k, v in tensors.items()}, file)
    return file


def test_a_weaker_model_guides(model: StableDiffusion, stable: Path, weaker: Path) -> None:
    itself = load(stable / "sd15.safetensors", device="cpu", guide=stable / "sd15.safetensors")
    alone = image(model, replace(REQUEST, guidance=1.0))
    assert np.abs(image(itself, replace(REQUEST, guidance=4.0)) - alone).max() <= 1, "two that say the same push nowhere"  # type: ignore[arg-type]
    other = load(stable / "sd15.safetensors", device="cpu", guide=weaker)
    assert np.abs(image(other, replace(REQUEST, guidance=4.0)) - alone).mean() > 1  # type: ignore[arg-type]
    assert np.abs(image(other, replace(REQUEST, guidance=1.0)) - alone).max() == 0  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"guide \(='emoji'\) must have the latents that the model has"):
        load(stable / "sd15.safetensors", device="cpu", guide="emoji")


def test_a_picture_is_drawn_again_with_what_it_was_drawn_with(stable: Path, weaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = load_file(stable / "sd15.safetensors")
    vae = {k.removeprefix("first_stage_model."): v for k, v in whole.items() if k.startswith("first_stage_model.")}
    vae["decoder.conv_out.bias"] = vae["decoder.conv_out.bias"] + 0.5
    save_file(vae, tmp_path / "vae.safetensors")
    common = ["--model", str(stable / "sd15.safetensors"), "--out"]
    first, again = str(tmp_path / "first.png"), str(tmp_path / "again.png")
    asked = ["a fox", "--seed", "3", "--steps", "1", "--width", "64", "--height", "64", "--vae", str(tmp_path / "vae.safetensors")]
    main(["generate", *asked, "--guide", str(weaker), "--prediction", "eps", *common, first])
    main(["generate", "--from", first, *common, again])
    assert Path(first).read_bytes() == Path(again).read_bytes()
    save_file(vae | {"decoder.conv_out.bias": -vae["decoder.conv_out.bias"]}, tmp_path / "vae.safetensors")
    with pytest.raises(SystemExit) as done:
        main(["generate", "--from", first, *common, again, "--force"])
    assert done.value.code == 2
    assert "the picture was drawn with prediction eps, vae" in capsys.readouterr().err


def test_averages_are_taken_where_they_are_asked_for(stable: Path, tmp_path: Path, model: StableDiffusion) -> None:
    """A file with the names that its authors give them; and of a folder the variant."""
    tensors = load_file(stable / "sd15.safetensors")
    unet = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model.")}
    averages = {"model_ema." + k.removeprefix("model.").replace(".", ""): v + 0.05 for k, v in unet.items()}
    save_file(tensors | averages, tmp_path / "full.safetensors")
    raw, averaged = (load(tmp_path / "full.safetensors", device="cpu", averaged=a) for a in (False, True))
    name = "conv_in.weight"
    assert torch.equal(raw.denoiser.state_dict()[name], model.denoiser.state_dict()[name])  # type: ignore[attr-defined]
    assert torch.equal(averaged.denoiser.state_dict()[name], model.denoiser.state_dict()[name] + 0.05)  # type: ignore[attr-defined]
    main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    for file in (tmp_path / "folder").rglob("*.safetensors"):
        save_file({k: v + 0.05 for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    varied = load(tmp_path / "folder", device="cpu", variant="fp16")
    assert torch.equal(varied.denoiser.state_dict()[name], averaged.denoiser.state_dict()[name])  # type: ignore[attr-defined]
    with pytest.raises(FileError, match="of the variant bf16"):
        load(tmp_path / "folder", device="cpu", variant="bf16")


def test_its_autoencoder_becomes_a_codec_to_train_on(
    model: StableDiffusion, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "codec.safetensors"), "--size", "64"])
    assert "a kl codec: f8, latents of 4 channels" in capsys.readouterr().err
    found = load_codec(tmp_path / "codec.safetensors")
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert found.size == 64
    assert torch.equal(found.codec.encode(x).mean, model.codec.encode(x).mean)  # type: ignore[arg-type, union-attr]
    for more, said in ((["--size", "63"], "size (=63) must be a multiple of 8"), (["--to", "taming", "--size", "64"], "size (=64) must be left out")):
        with pytest.raises(SystemExit) as done:
            main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "other.safetensors"), *more])
        assert done.value.code == 2
        assert said in capsys.readouterr().err


def test_a_tiny_autoencoder_draws_in_its_place(model: StableDiffusion, stable: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny = TinyAutoencoder(TinyConfig())
    named = {(k.replace("coder.", "coder.layers.", 1)): v for k, v in tiny.state_dict().items()}
    save_file(named, tmp_path / "taesd.safetensors")
    drawing = load(stable / "sd15.safetensors", device="cpu", vae=tmp_path / "taesd.safetensors")
    request = replace(REQUEST, init=str(stable / "photo.png"), strength=0.5)
    assert np.abs(image(drawing, request) - image(model, request)).mean() > 1  # type: ignore[arg-type]
    assert image(drawing, replace(REQUEST, tiling=True)).shape == (64, 64, 3)  # type: ignore[arg-type]


def test_bad_input_is_one_line(model: StableDiffusion, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd, out = str(stable / "sd15.safetensors"), str(tmp_path / "a.png")
    save_file({"something": torch.zeros(2)}, tmp_path / "other.safetensors")
    for argv, said in (
        (["--clip-skip", "9"], "clip_skip (=9) must be from 1 to 2"),
        (["--schedule", "kerras"], "did you mean 'karras'"),
        (["--sampler", "dpmpp"], "sampler (='dpmpp') must be one of"),
        (["--extend", "8", "0", "0", "0"], "name one with --init"),
        (["--lora", str(tmp_path / "none.safetensors")], "there is no such file"),
        (["--model", str(tmp_path / "other.safetensors")], "holds no UNet of Stable Diffusion"),
        (["--steps", "1001"], "between 1 and 1,000"),
        (["--style", "noto"], "this model has no styles"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["generate", "a fox", "--model", sd, "--width", "64", "--height", "64", "--steps", "1", "--out", out, "--force", *argv])
        assert done.value.code == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert said in error
    with pytest.raises(SystemExit):
        main(["generate", "a fox", "--width", "64", "--out", out])
    assert "width (=64) must be left out: it is for checkpoints of Stable Diffusion" in capsys.readouterr().err
    save_file({"control_model.x": torch.zeros(2)}, tmp_path / "control.safetensors")
    with pytest.raises(FileError, match="is a ControlNet"):
        load(tmp_path / "control.safetensors")


def test_what_a_file_is(stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"x.dora_scale": torch.zeros(2)}, tmp_path / "dora.safetensors")
    for file, said in (
        (stable / "sd15.safetensors", "checkpoint of Stable Diffusion"),
        (stable / "sd15.ckpt", "holds: UNet, autoencoder, text encoder"),
        (stable / "style.safetensors", "rank: 2"),
        (stable / "my-style.pt", "textual inversion"), (tmp_path / "dora.safetensors", "a DoRA (not read)"),
    ):  # fmt: skip
        main(["info", str(file)])
        assert said in capsys.readouterr().out, file


def test_it_is_converted_and_draws_the_same(model: StableDiffusion, stable: Path, tmp_path: Path) -> None:
    main(["convert", str(stable / "sd15.ckpt"), str(tmp_path / "folder"), "--to", "diffusers"])
    main(["convert", str(tmp_path / "folder"), str(tmp_path / "again.safetensors"), "--to", "single", "--half"])
    one = image(model, REQUEST)
    assert np.abs(image(load(tmp_path / "folder", device="cpu"), replace(REQUEST, schedule="karras")) - one).max() <= 1  # type: ignore[arg-type]
    assert np.abs(image(load(tmp_path / "again.safetensors", device="cpu"), REQUEST) - one).mean() <= 2  # type: ignore[arg-type]


def test_a_large_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    assert loading.file_hash(file) == hashlib.sha256(b"one").hexdigest()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text("0" * 64)
    assert loading.file_hash(file) == "0" * 64, "it was not read again"
    file.write_bytes(b"three")
    assert loading.file_hash(file) == hashlib.sha256(b"three").hexdigest()
    kept.write_text("not a hash")
    assert loading.file_hash(tmp_path) == hashlib.sha256(hashlib.sha256(b"three").hexdigest().encode()).hexdigest(), "of a folder that of its files'"


@pytest.mark.parametrize("size", [(500, 333), (222, 188), (101, 640), (37, 41)])
def test_pictures_of_any_shape_are_begun_from(size: tuple[int, int], model: StableDiffusion, tmp_path: Path) -> None:
    Image.linear_gradient("L").convert("RGB").resize(size).save(tmp_path / "init.png")
    request = GenerateRequest(prompt="a fox", init=str(tmp_path / "init.png"))
    height, width = model.extent(request)
    assert height % 8 == width % 8 == 0
    assert height * width <= 512**2 + 8 * (height + width)
    assert width / height == pytest.approx(size[0] / size[1], rel=0.3)
    begun = model.begin(replace(request, width=48, height=24))
    assert begun is not None
    assert begun.x.shape == (1, 3, 24, 48)
    assert model.extent(replace(request, width=64))[0] == pytest.approx(64 * size[1] / size[0], abs=4.01), "the other side by its shape"


def test_the_way_from_one_prompt_to_another(model: StableDiffusion) -> None:
    a, b = replace(REQUEST, prompt="a fox"), replace(REQUEST, prompt="a red house, " + "in the snow, " * 40, seed=8)
    for noise in ("own", "diffusers", "a1111"):
        frames = [np.asarray(p.image).astype(float) for p in model.morph(replace(a, noise=noise), replace(b, noise=noise), 3)]  # type: ignore[arg-type]
        ends = [image(model, replace(r, noise=noise)) for r in (a, b)]  # type: ignore[arg-type]
        assert np.abs(frames[0] - ends[0]).max() <= 1, noise
        assert np.abs(frames[2] - ends[1]).max() <= 1, noise
        assert min(np.abs(frames[1] - end).mean() for end in ends) > 1, noise


def test_noise_of_a_gpu_goes_on_in_the_steps(model: StableDiffusion) -> None:
    (row,) = model._rows(replace(REQUEST, noise="a1111"))
    stream = model._stream(row, None)
    assert np.array_equal(stream.first.numpy(), Philox(3).normal(*stream.first.shape))
    assert np.array_equal(stream.fresh().numpy(), Philox(3, calls=1).normal(*stream.first.shape))
    other = torch.from_numpy(Philox(9).normal(*stream.first.shape))
    varied = [model._stream(r, None).first for r in model._rows(replace(REQUEST, noise="a1111", count=2, variation=1.0, variation_seed=9))]
    assert torch.allclose(varied[0], other, atol=1e-5)
    assert np.allclose(varied[1], Philox(10).normal(*stream.first.shape), atol=1e-5), "a batch varies the other seed"
    (half,) = model._rows(replace(REQUEST, noise="a1111", variation=0.5, variation_seed=9))
    found = model._stream(half, None).first
    assert float(found.square().mean()) == pytest.approx(1.0, abs=0.1), "half the way along the arc the noise is as loud as it was"
    assert float((found * stream.first).mean()) == pytest.approx(float((found * other).mean()), abs=0.05)


def test_large_pictures_fit_together_at_their_edges(model: StableDiffusion) -> None:
    """Rolled latents give the rolled picture, in tiles too, but for what tiles themselves change."""
    z = torch.randn(1, 4, 16, 144, generator=torch.Generator().manual_seed(0))
    with seamless([model.codec], True), torch.no_grad():  # type: ignore[list-item]
        one, rolled = model.decode(z), model.decode(z.roll(40, 3)).roll(-320, 3)
        apart = (one - rolled).abs()
    assert float(apart.mean()) < 0.25 * float(one.std())
    with torch.no_grad():
        cut = (model.decode(z) - model.decode(z.roll(40, 3)).roll(-320, 3)).abs()
    edge = slice(-16, None)
    assert float(apart[..., edge].mean()) < 0.5 * float(cut[..., edge].mean()), "the edge is none"


def test_a_lora_that_changed_is_not_passed_off(stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = tmp_path / "style.safetensors"
    lora.write_bytes((stable / "style.safetensors").read_bytes())
    common = ["--model", str(stable / "sd15.safetensors"), "--force", "--out"]
    asked = ["--seed", "3", "--steps", "1", "--width", "64", "--height", "64"]
    main(["generate", "a fox <lora:style:0.5>", *asked, "--lora", str(lora), *common, str(tmp_path / "a.png")])
    main(["generate", "a fox", *asked, "--lora", f"{lora}:0.5", *common, str(tmp_path / "b.png")])
    main(["generate", "a fox", *asked, "--lora", f"{lora}:0.25", "--lora", f"{lora}:0.25", *common, str(tmp_path / "c.png")])
    pictures = [np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in "abc"]
    assert np.array_equal(pictures[0], pictures[1]), "the prompt's tag says the strength, and is no word"
    assert np.abs(pictures[0] - pictures[2]).max() <= 1, "a flag may be given several times"
    capsys.readouterr()
    save_file({k: -v for k, v in load_file(lora).items()}, lora)
    with pytest.raises(SystemExit) as done:
        main(["generate", "--from", str(tmp_path / "a.png"), *common, str(tmp_path / "d.png")])
    assert done.value.code == 2
    assert "is not the file that the picture was drawn with" in capsys.readouterr().err


def test_a_checkpoint_without_an_autoencoder(stable: Path, tmp_path: Path, model: StableDiffusion) -> None:
    whole = load_file(stable / "sd15.safetensors")
    save_file({k: v for k, v in whole.items() if not k.startswith("first_stage_model.")}, tmp_path / "pruned.safetensors")
    with pytest.raises(FileError, match=r"holds no autoencoder .*: name one with --vae"):
        load(tmp_path / "pruned.safetensors", device="cpu")
    found = load(tmp_path / "pruned.safetensors", device="cpu", vae=str(stable / "sd15.safetensors"))
    assert np.array_equal(image(found, REQUEST), image(model, REQUEST))  # type: ignore[arg-type]


def test_options_as_others_write_them(model: StableDiffusion, stable: Path) -> None:
    plain = GenerateRequest(sampler="ancestral", schedule="karras", lora=("a",), extend=(1, 2, 3, 4), init="x")
    assert GenerateRequest(sampler="Euler a Karras", lora="a", extend=[1, 2, 3, 4], init="x") == plain  # type: ignore[arg-type]
    assert GenerateRequest(sampler="euler_a", schedule="Karras", lora=["a"], extend=[1, 2, 3, 4], init="x") == plain  # type: ignore[arg-type]
    assert GenerateRequest(schedule="exponential").schedule == "lambda"
    assert len(model.generate("a fox", seed=1, steps=1, width=64, height=64, lora=[str(stable / "style.safetensors")])) == 1
    with pytest.raises(ValueError, match=r"widht \(=64\) is no option: .*did you mean 'width'"):
        model.generate("a fox", widht=64)


def test_what_is_not_read_is_named(stable: Path, tmp_path: Path) -> None:
    whole = load_file(stable / "sd15.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file(whole | {name: torch.zeros(32, 8, 3, 3)}, tmp_path / "edits.safetensors")
    with pytest.raises(FileError, match="a UNet of 8 channels, as of InstructPix2Pix"):
        load(tmp_path / "edits.safetensors", device="cpu")
    main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    told = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"_class_name": "DEISMultistepScheduler", "thresholding": True}))
    notes = read_checkpoint(tmp_path / "folder").notes
    assert "thresholding (=True), _class_name (=DEISMultistepScheduler)" in notes[0]


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**7}, {"layers_per_block": 10**7}, {"num_train_timesteps": 10**12}, "deep"], ids=str)
def test_absurd_configs_are_refused_at_once(change: Any, stable: Path, tmp_path: Path) -> None:
    main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    parts = {"num_hidden_layers": "text_encoder/config.json", "num_train_timesteps": "scheduler/scheduler_config.json"}
    told = tmp_path / "folder" / parts.get(next(iter(change)), "unet/config.json")
    told.write_text("[" * 100_000 if change == "deep" else json.dumps(json.loads(told.read_text()) | change))
    begun = time.perf_counter()
    with pytest.raises(FileError) as said:
        read_checkpoint(tmp_path / "folder")
    assert time.perf_counter() - begun < 2
    assert "\n" not in str(said.value)


def test_what_a_folder_is(stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", str(stable / "sd15.safetensors"), str(tmp_path / "folder"), "--to", "diffusers"])
    main(["info", str(tmp_path / "folder")])
    shown = capsys.readouterr().out
    assert "version: ?" in shown, "a tiny one has a width of no version"
    for said in ("predicts: eps", "sampler: dpmpp_2m", "schedule: karras", "bytes: "):
        assert said in shown
    main(["info", str(tmp_path / "folder" / "vae")])
    assert "folder of diffusers: AutoencoderKL" in capsys.readouterr().out


def test_signs_that_are_no_signs_here_are_said(stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "--model",
        str(stable / "sd15.safetensors"),
        "--steps",
        "1",
        "--width",
        "64",
        "--height",
        "64",
        "--out",
        str(tmp_path / "a.png"),
        "--force",
    ]
    for prompt, said in (
        ("a [fox:cat:0.5]", "'[fox:cat:0.5]' is heard as words"), ("a fox AND a cat", "'AND' is heard"), ("<lora:x:1> a fox", "x, a LoRA named"),
        ("一只狐狸", "Chinese words mean little"), ("a [fox], (red:1.2)", ""),
    ):  # fmt: skip
        main(["generate", prompt, *asked])
        told = capsys.readouterr().err
        assert said in told
        assert said or "heard as words" not in told
