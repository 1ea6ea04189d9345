"""Pictures by other engines, in less memory, and in the fast mode: the same, or as near as they say, and refused where they cannot be."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sfumato.apps.cli import main
from sfumato.convert.kohya import Lora, lora_tensors
from sfumato.convert.stable import read_checkpoint, write_single
from sfumato.core.request import GenerateRequest
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.nn.engine import Engine
from sfumato.nn.lora import Delta
from sfumato.pipelines.generate import Model
from sfumato.pipelines.load import load
from sfumato.pipelines.stable_diffusion import StableDiffusion

REQUEST = GenerateRequest(prompt="a fox", seed=3, steps=3, width=64, height=64)


def image(model: Model, request: GenerateRequest) -> np.ndarray:
    (picture,) = model.pictures(request)
    return np.asarray(picture.image).astype(float)


@pytest.fixture(scope="module")
def eager(stable: Path) -> Model:
    return load(stable / "sd15.safetensors", device="cpu", engine="eager")


@pytest.fixture(scope="module")
def openvino(stable: Path) -> Model:
    pytest.importorskip("openvino")
    return load(stable / "sd15.safetensors", device="cpu", engine="openvino")


@pytest.mark.parametrize("change", [{}, {"width": 96, "height": 40}, {"count": 2}, {"lora": 0.8}, {"tiling": True}, {"hires": 1.5}], ids=str)
def test_pictures_of_openvino_are_those_of_eager(eager: Model, openvino: Model, stable: Path, change: dict[str, object]) -> None:
    if "lora" in change:
        change = {"lora": (f"{stable / 'style.safetensors'}:{change['lora']}",)}
    request = replace(REQUEST, **change)  # type: ignore[arg-type]
    for a, b in zip(eager.pictures(request), openvino.pictures(request), strict=True):
        assert np.abs(np.asarray(a.image).astype(float) - np.asarray(b.image)).max() <= 1
        assert b.record["engine"].startswith("openvino")
        assert a.record["engine"].startswith("torch")
    assert np.abs(image(openvino, REQUEST) - image(eager, REQUEST)).max() <= 1, "and nothing of it is left behind"


def test_a_picture_is_drawn_again_by_its_engine(openvino: Model, stable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, again = (str(tmp_path / f"{n}.png") for n in "ab")
    asked = ["generate", "a fox", "--seed", "3", "--steps", "2", "--width", "64", "--height", "64", "--device", "cpu"]
    main([*asked, "--model", str(stable / "sd15.safetensors"), "--engine", "openvino", "--out", first])
    main(["generate", "--from", first, "--model", str(stable / "sd15.safetensors"), "--out", again])
    assert Path(first).read_bytes() == Path(again).read_bytes()
    capsys.readouterr()
    main(["generate", "--from", first, "--model", str(stable / "sd15.safetensors"), "--engine", "eager", "--out", again, "--force"])
    assert "it was drawn with engine openvino" in capsys.readouterr().err


def test_halves_stay_halves_and_draw_the_same(stable: Path, tmp_path: Path) -> None:
    write_single(read_checkpoint(stable / "sd15.safetensors"), tmp_path / "half.safetensors", half=True)
    plain, low = (load(tmp_path / "half.safetensors", device="cpu", engine="eager", low_memory=low) for low in (False, True))
    assert {p.dtype for p in plain.network.parameters()} == {torch.float32}
    request = replace(REQUEST, prompt="a (fox:1.3)", lora=(str(stable / "style.safetensors"),))
    assert np.array_equal(image(plain, REQUEST), image(low, REQUEST))
    assert np.array_equal(image(plain, request), image(low, request))
    assert isinstance(low, StableDiffusion)
    weights = [p for n in (low.denoiser, low.codec, *(e.network for e in low.ears)) for p in n.parameters()]
    assert {p.dtype for p in weights} == {torch.float16}
    assert low.engine.name == "eager"


def test_graphs_of_halves_are_halves(stable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    write_single(read_checkpoint(stable / "sd15.safetensors"), tmp_path / "half.safetensors", half=True)
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    plain, quick = (load(tmp_path / "half.safetensors", device="cpu", engine=e) for e in ("eager", "openvino"))  # type: ignore[arg-type]
    for request in (REQUEST, replace(REQUEST, lora=(str(stable / "style.safetensors"),))):
        assert np.abs(image(plain, request) - image(quick, request)).max() <= 1
    assert isinstance(quick, StableDiffusion)
    assert {p.dtype for p in quick.denoiser.parameters()} == {torch.float16}
    sizes = sorted(p.stat().st_size for p in (tmp_path / "cache" / "engine").glob("*/graph.bin"))
    assert sizes[-1] < 3 * sum(p.numel() for p in quick.denoiser.parameters()), "two bytes a weight, and what a LoRA changed four"


def test_fast_asks_the_whole_network_less_often(eager: Model) -> None:
    calls: list[int] = []
    hook = eager.network.mid_block.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr, operator]
    try:
        request = replace(REQUEST, steps=9)
        exact = image(eager, request)
        whole = len(calls)
        (picture,) = eager.pictures(replace(request, fast=True))
        assert (whole, len(calls) - whole) == (9, 3), "calls of both terms together"
    finally:
        hook.remove()
    assert picture.record["request"].cache_interval == 3
    assert picture.record["request"].guidance_interval is None
    assert np.abs(np.asarray(picture.image) - exact).max() > 0
    assert np.array_equal(image(eager, replace(request, cache_interval=1)), exact)
    (again,) = eager.pictures(picture.record["request"])
    assert again.png() == picture.png()


def test_a_lora_from_a_time_on_is_at_work_in_the_fast_mode_too(smoke: Path, tmp_path: Path) -> None:
    """On a UNet of our own kind of model, whose whole and shallow steps are asked for by name."""
    ours = load(smoke / "diffusion", device="cpu")
    denoiser = UNet(UNetConfig(channels=ours.codec.spec.latent_channels, out_channels=ours.codec.spec.latent_channels, widths=(32, 64), blocks=1,  # type: ignore[union-attr]
                               depths=(1, 0), heads=(2, 2), context=ours.text.config.width))  # type: ignore[union-attr]  # fmt: skip
    model = replace(ours, denoiser=denoiser.eval().requires_grad_(False))  # type: ignore[call-arg]
    layer = "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_q"
    weight = denoiser.get_submodule(layer).weight
    file = tmp_path / "late.safetensors"
    tensors = lora_tensors(Lora({"denoiser": {layer: Delta(torch.randn(4, weight.shape[1]), 3 * torch.randn(weight.shape[0], 4))}}, {}), "kohya")
    save_file(tensors, file, {"format": "pt", "until": "0.5"})
    for change in ({}, {"cache_interval": 3}, {"fast": True}):
        request = GenerateRequest(prompt="a cat", seed=3, steps=6, **change)  # type: ignore[arg-type]
        assert np.abs(image(model, request) - image(model, replace(request, lora=(f"{file}:5",)))).max() > 1, change


def test_what_is_drawn_at_once_with_something_else_leaves_nothing_behind(openvino: Model, eager: Model) -> None:
    """Two generators, of which the one begun first ends first."""
    first, second = openvino.pictures(REQUEST), openvino.pictures(replace(REQUEST, tiling=True, count=8))
    next(first), next(second)
    first.close()  # type: ignore[attr-defined]
    list(second)
    assert np.abs(image(openvino, REQUEST) - image(eager, REQUEST)).max() <= 1


def test_averages_and_what_learns_are_eager(openvino: Model, stable: Path) -> None:
    tuned = replace(openvino, denoiser=copy.deepcopy(openvino.network))  # type: ignore[call-arg]
    with torch.no_grad():
        for p in tuned.network.parameters():
            p.mul_(0.5)
    other = replace(tuned, engine=Engine())
    assert np.array_equal(image(tuned, REQUEST), image(other, REQUEST))
    assert not np.array_equal(image(tuned, REQUEST), image(openvino, REQUEST))


def test_what_cannot_be(stable: Path, smoke: Path) -> None:
    ours = load(smoke / "diffusion", device="cpu")
    assert not isinstance(ours.network, UNet)
    with pytest.raises(ValueError, match=r"cache_interval \(=2\) must be left out: it is for models with a UNet"):
        ours.generate("a cat", cache_interval=2)
    found = ours.complete(GenerateRequest(fast=True))
    assert (found.cache_interval, found.guidance_interval) == (None, (0.2, 1.0)), "fast is what can be had"
    with pytest.raises(ValueError, match=r"cache_interval \(=0\) must be between 1"):
        GenerateRequest(cache_interval=0)
    with pytest.raises(ValueError, match=r"low_memory .* is for checkpoints of Stable Diffusion"):
        load(smoke / "diffusion", low_memory=True)
    with pytest.raises(ValueError, match=r"engine \(='openvino'\) holds weights in 32 bits"):
        load(stable / "sd15.safetensors", device="cpu", low_memory=True, engine="openvino")
    with pytest.raises(ValueError, match=r"low_memory .* is for fp32 on a CPU"):
        load(stable / "sd15.safetensors", device="cpu", dtype="bf16", low_memory=True)


def test_our_own_models_by_openvino(smoke: Path) -> None:
    pytest.importorskip("openvino")
    eager, openvino = (load(smoke / "diffusion", device="cpu", engine=e) for e in ("eager", "openvino"))  # type: ignore[arg-type]
    for count in (1, 3):
        request = GenerateRequest(prompt="a cat", seed=3, steps=2, count=count)
        for a, b in zip(eager.pictures(request), openvino.pictures(request), strict=True):
            assert np.abs(np.asarray(a.image).astype(float) - np.asarray(b.image)).max() <= 1


def test_graphs_are_shown_and_removed(openvino: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    openvino.engine.made.clear()
    image(openvino, REQUEST)
    assert list((tmp_path / "engine").iterdir())
    main(["paths"])
    assert "cache\t0.0 MB" not in capsys.readouterr().out
    main(["paths", "--clean"])
    assert not (tmp_path / "engine").exists()
