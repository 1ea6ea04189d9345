"""Whole pictures beside those of diffusers: the same checkpoint, request and noise, 1e-3 in [0, 1]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
)
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image

from sfumato.convert.kohya import Lora, write_lora
from sfumato.convert.stable import read_checkpoint, write_folder, write_single
from sfumato.core.request import GenerateRequest
from sfumato.nn.lora import Delta
from sfumato.pipelines.load import load
from sfumato.text.clip import ClipText
from sfumato.text.prompts import heard
from sfumato.train import embedding, finetune, lora
from sfumato.train.embedding import EmbeddingRecipe
from sfumato.train.finetune import FinetuneRecipe
from sfumato.train.loop import LoopConfig
from sfumato.train.lora import LoraRecipe

PROMPT, NEGATIVE = "a photo of a red fox, sitting in the snow", "blurry, low quality"
CLOSE = 1e-3
BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
DRAW = ["1", "2", "xl"]  # what draws without a picture to draw into


def drawn(model: Any, request: GenerateRequest) -> np.ndarray:
    """What is decoded, in [0, 1], before it is rounded to 8 bits."""
    rows = model._rows(request)
    begun = model.begin(rows[0].request)
    *_, last = model.latents(rows, begun)
    return ((model.decode(last).clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def theirs(pipe: Any, **more: Any) -> np.ndarray:
    said = {"prompt": PROMPT, "negative_prompt": NEGATIVE} | more
    return pipe(guidance_scale=5.0, generator=torch.Generator().manual_seed(7), output_type="np", **said).images


def again(reference: Any) -> Any:
    """A pipeline of its own, which may be changed."""
    pipe = type(reference.pipe).from_pretrained(reference.folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def photograph(side: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


REQUEST = GenerateRequest(prompt=PROMPT, negative=NEGATIVE, guidance=5.0, seed=7, steps=6, noise="diffusers", width=64, height=64)


@pytest.mark.parametrize("reference", DRAW, indirect=True)
def test_pictures_from_words(reference: Any) -> None:
    model = load(reference.folder, device="cpu")
    changes: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({}, {}), ({"width": 96, "height": 32}, {}), ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}), ({"clip_skip": 2}, {"clip_skip": 1}),
        ({"negative": None}, {"negative_prompt": None}),
    )  # fmt: skip
    if not hasattr(reference.pipe.text_encoder, "text_model"):  # which diffusers looks for the norm in, and transformers 5 no longer has
        reference.pipe.text_encoder.text_model = SimpleNamespace(final_layer_norm=reference.pipe.text_encoder.final_layer_norm)
    for change, more in changes:
        request = replace(REQUEST, **change)
        expected = theirs(reference.pipe, num_inference_steps=6, width=request.width, height=request.height, **more)
        assert np.abs(drawn(model, request) - expected).max() <= CLOSE, change
    assert float(expected.std()) > 0.02, "a picture of one colour would prove nothing"


SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler, trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    "euler, karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_2m, karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}


@pytest.mark.parametrize("reference", ["1"], indirect=True)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_are_obeyed(name: str, reference: Any, tmp_path: Path) -> None:
    made, more = SCHEDULERS[name]
    pipe = type(reference.pipe)(**{**reference.pipe.components, "scheduler": made.from_config(reference.pipe.scheduler.config, **more)},
                                requires_safety_checker=False)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    assert model.usual["sampler"] == name.split(",")[0]
    assert np.abs(drawn(model, REQUEST) - theirs(pipe, num_inference_steps=6, width=64, height=64)).max() <= CLOSE


@pytest.mark.parametrize("reference", DRAW, indirect=True)
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_pictures_from_pictures(name: str, reference: Any, tmp_path: Path) -> None:
    """Not with PLMS, of whose doubled first step diffusers leaves one half out there."""
    made = StableDiffusionXLImg2ImgPipeline if reference.kind == "xl" else StableDiffusionImg2ImgPipeline
    parts = {k: v for k, v in reference.pipe.components.items() if k not in ("image_encoder", "feature_extractor", "safety_checker")}
    extra = {} if reference.kind == "xl" else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scheduler, more = SCHEDULERS[name]
    parts["scheduler"] = scheduler.from_config(reference.pipe.scheduler.config, **more)
    pipe = made(**parts, **extra, **({"add_watermarker": False} if reference.kind == "xl" else {}))
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    photograph().save(tmp_path / "init.png")
    model = load(tmp_path, device="cpu")
    request = replace(REQUEST, init=str(tmp_path / "init.png"), strength=0.5)
    expected = theirs(pipe, image=photograph(), strength=0.5, num_inference_steps=6)
    assert np.abs(drawn(model, request) - expected).max() <= CLOSE


@pytest.mark.parametrize("reference", ["1"], indirect=True)
def test_a_tiny_autoencoder_in_a_folder(reference: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = {**reference.pipe.components, "vae": AutoencoderTiny().eval(), "scheduler": DDIMScheduler.from_config(reference.pipe.scheduler.config)}
    pipe = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    photograph().save(tmp_path / "init.png")
    request = replace(REQUEST, init=str(tmp_path / "init.png"), strength=0.5)
    expected = theirs(pipe, image=photograph(), strength=0.5, num_inference_steps=6)
    assert np.abs(drawn(load(tmp_path, device="cpu"), request) - expected).max() <= CLOSE


@pytest.mark.parametrize("reference", ["1", "2", "xl", "inpainting"], indirect=True)
@pytest.mark.parametrize("strength", [0.7, 1.0])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "ancestral"])
def test_pictures_redrawn_under_a_mask(name: str, strength: float, reference: Any, tmp_path: Path) -> None:
    scheduler, more = SCHEDULERS[name]
    scheduler = scheduler.from_config(reference.pipe.scheduler.config, **more)
    parts = {**reference.pipe.components, "scheduler": scheduler}
    if reference.kind == "xl":
        pipe = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        pipe = StableDiffusionInpaintPipeline(**parts | {"safety_checker": None, "feature_extractor": None}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 20, 50, 60))
    photograph().save(tmp_path / "init.png")
    mask.save(tmp_path / "mask.png")
    model = load(tmp_path, device="cpu")
    request = replace(REQUEST, init=str(tmp_path / "init.png"), mask=str(tmp_path / "mask.png"), strength=strength)
    expected = theirs(pipe, image=photograph(), mask_image=mask, strength=strength, num_inference_steps=6, width=64, height=64)
    assert np.abs(drawn(model, request) - expected).max() <= CLOSE


def test_what_we_write_diffusers_draws_with(reference: Any, tmp_path: Path) -> None:
    """diffusers -> ours -> folder -> diffusers: the same weights bit for bit, and the same picture."""
    write_folder(read_checkpoint(reference.folder), tmp_path / "folder")
    pipe = type(reference.pipe).from_pretrained(tmp_path / "folder", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if (network := getattr(reference.pipe, part, None)) is not None:
            back = getattr(pipe, part).state_dict()
            assert all(torch.equal(v, back[k]) for k, v in network.state_dict().items()), part
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"], "nothing is left beside it"
    if reference.kind != "inpainting":
        for negative in (NEGATIVE, None):
            one, other = (theirs(p, num_inference_steps=2, width=64, height=64, negative_prompt=negative) for p in (reference.pipe, pipe))
            assert np.array_equal(one, other)


@pytest.mark.parametrize("reference", ["1", "2"], indirect=True)
def test_what_we_write_as_one_file(reference: Any, tmp_path: Path) -> None:
    """Read by us it draws the same, and by diffusers it has the same weights; and as a folder again. Of small networks 1.x and 2.x alone can go that
    way: how many heads there are no shape tells, and those of 64 numbers are the real ones.
    """
    found = read_checkpoint(reference.folder)
    write_single(found, tmp_path / "single.safetensors")
    again = read_checkpoint(tmp_path / "single.safetensors", prediction="eps")
    for one, other in ((found.unet, again.unet), (found.codec, again.codec)):
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    for skip in (1, 2):
        heads = replace(found.ears[0], network=_with_heads(found.ears[0].network, again.ears[0].network.config.heads))
        assert torch.allclose(heard([again.ears[0]], [PROMPT], skip).text, heard([heads], [PROMPT], skip).text, atol=1e-6)  # type: ignore[arg-type]
    as_one = type(reference.pipe).from_single_file(tmp_path / "single.safetensors", config=str(reference.folder), local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        back = getattr(as_one, part).state_dict()
        assert all(torch.equal(v, back[k]) for k, v in getattr(reference.pipe, part).state_dict().items()), part
    write_folder(replace(again, scheduler=found.scheduler), tmp_path / "folder")
    pipe = type(reference.pipe).from_pretrained(tmp_path / "folder", local_files_only=True)
    back = pipe.text_encoder.state_dict()
    assert all(torch.equal(v, back[k]) for k, v in reference.pipe.text_encoder.state_dict().items()), "and no more blocks than it had"
    assert pipe.text_encoder.config.num_hidden_layers == reference.pipe.text_encoder.config.num_hidden_layers
    pipe.set_progress_bar_config(disable=True)
    assert theirs(pipe, num_inference_steps=2, width=64, height=64).shape == (1, 64, 64, 3)


def _with_heads(network: ClipText, heads: int) -> ClipText:
    other = ClipText(replace(network.config, heads=heads)).eval().requires_grad_(False)
    other.load_state_dict(network.state_dict())
    return other


@pytest.mark.parametrize("reference", ["1", "xl"], indirect=True)
def test_models_for_few_steps_are_asked_when_they_learned_to_be(reference: Any, tmp_path: Path) -> None:
    parts = {k: v for k, v in reference.pipe.components.items() if k not in ("image_encoder", "feature_extractor", "safety_checker")}
    scheduler = LCMScheduler(**{k: reference.pipe.scheduler.config[k] for k in BETAS}, prediction_type="epsilon", clip_sample=False)
    extra = (
        {"add_watermarker": False}
        if reference.kind == "xl"
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    pipe = type(reference.pipe)(**parts | {"scheduler": scheduler}, **extra)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path)
    model = load(tmp_path, device="cpu")
    for steps in (1, 4, 7):
        expected = theirs(pipe, num_inference_steps=steps, width=64, height=64)
        assert np.abs(drawn(model, replace(REQUEST, steps=steps)) - expected).max() <= CLOSE, steps


@pytest.mark.parametrize("reference", DRAW, indirect=True)
def test_a_batch_is_four_singles(reference: Any) -> None:
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, noise="own", count=4, seed=3)
    together = drawn(model, request)
    for i in range(4):
        assert np.abs(drawn(model, replace(request, count=1, seed=3 + i)) - together[i]).max() <= 1e-4


@pytest.mark.parametrize("reference", DRAW, indirect=True)
def test_a_prompt_is_the_same_beside_a_long_one(reference: Any) -> None:
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, noise="own")
    long = replace(request, prompt=PROMPT + ", in the snow" * 40, negative="blurry " * 100)
    one, other = (np.asarray(p.image).astype(int) for p in model.draw([request, long]))
    assert np.abs(one - np.asarray(next(model.pictures(request)).image)).max() <= 1
    assert np.abs(other - np.asarray(next(model.pictures(long)).image)).max() <= 1


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
OTHERS = ["ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]
LAYERS = {"attention": ATTENTION, "everything": ATTENTION + OTHERS}


@pytest.mark.parametrize("reference", DRAW, indirect=True)
@pytest.mark.parametrize(
    ("layers", "settings"),
    [("attention", {"lora_alpha": 8, "use_rslora": True}), ("everything", {"lora_alpha": 3, "alpha_pattern": {"to_q": 9, "q_proj": 7}})],
    ids=("attention", "everything"),
)
def test_a_lora_that_diffusers_wrote(settings: dict[str, Any], layers: str, reference: Any, tmp_path: Path) -> None:
    """Of the UNet and the text encoders: peft's own layers draw, and ours with the file that diffusers wrote of them, 1e-4."""
    pipe = again(reference)
    plain = theirs(pipe, num_inference_steps=4, width=64, height=64)
    texts = [n for n in ("text_encoder", "text_encoder_2") if getattr(pipe, n, None) is not None]
    files: dict[str, Any] = {}
    torch.manual_seed(5)
    for name in ("unet", *texts):
        targets = LAYERS[layers] if name == "unet" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        config = LoraConfig(r=4, target_modules=targets, **settings)
        network = inject_adapter_in_model(config, getattr(pipe, name))
        for key, value in network.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(value, std=0.1)
        files |= {f"{name}_lora_layers": get_peft_model_state_dict(network), f"{name}_lora_adapter_metadata": config.to_dict()}
    type(pipe).save_lora_weights(tmp_path, **files)
    expected = theirs(pipe, num_inference_steps=4, width=64, height=64)
    assert np.abs(expected - plain).max() > 0.02, "a LoRA without effect would prove nothing"
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, steps=4, lora=(str(tmp_path / "pytorch_lora_weights.safetensors"),))
    with model.changed(request):  # type: ignore[attr-defined]
        assert np.abs(drawn(model, request) - expected).max() <= 1e-4
    assert np.abs(drawn(model, replace(request, lora=())) - plain).max() <= CLOSE


@pytest.mark.parametrize("reference", DRAW, indirect=True)
def test_a_share_of_a_lora(reference: Any, tmp_path: Path) -> None:
    """As diffusers reads and weighs it."""
    config = LoraConfig(r=4, lora_alpha=3, target_modules=LAYERS["everything"])
    network = inject_adapter_in_model(config, type(reference.pipe.unet)(**reference.pipe.unet.config))
    torch.manual_seed(5)
    for key, value in network.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(value, std=0.1)
    type(reference.pipe).save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(network))
    pipe = again(reference)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors", adapter_name="it")
    pipe.set_adapters("it", 0.7)
    expected = theirs(pipe, num_inference_steps=4, width=64, height=64)
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, steps=4, lora=(f"{tmp_path / 'pytorch_lora_weights.safetensors'}:0.7",))
    with model.changed(request):  # type: ignore[attr-defined]
        assert np.abs(drawn(model, request) - expected).max() <= 1e-4


@pytest.mark.parametrize("reference", ["1", "xl"], indirect=True)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_a_lora_that_we_wrote_diffusers_draws_with(layout: str, reference: Any, tmp_path: Path) -> None:
    model = load(reference.folder, device="cpu")
    g = torch.Generator().manual_seed(5)
    layers = [n for n, m in model.denoiser.named_modules() if n.endswith(("to_q", "to_v", "ff.net.2"))]  # type: ignore[attr-defined]
    sides = {n: model.denoiser.get_submodule(n).weight.shape for n in layers}  # type: ignore[attr-defined, union-attr]
    deltas = {n: Delta(0.3 * torch.randn(4, s[1], generator=g), 0.3 * torch.randn(s[0], 4, generator=g), 3.0) for n, s in sides.items()}
    write_lora(Lora({"unet": deltas}, {}), tmp_path / "ours.safetensors", layout=layout)
    pipe = again(reference)
    plain = theirs(pipe, num_inference_steps=4, width=64, height=64)
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="it")
    expected = theirs(pipe, num_inference_steps=4, width=64, height=64)
    assert np.abs(expected - plain).max() > 0.02
    request = replace(REQUEST, steps=4, lora=(str(tmp_path / "ours.safetensors"),))
    with model.changed(request):  # type: ignore[attr-defined]
        assert np.abs(drawn(model, request) - expected).max() <= 1e-4


# --- what is trained here -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        photograph().rotate(90 * i).save(folder / f"{i}.png")
    return folder


LOOP = LoopConfig(images=8, batch_size=2, warmup=0, lr=0.05, decay=0.0, save_every=8, sample_every=16, log_every=2, weight_decay=0.0, device="cpu")


def of(reference: Any, photos: Path) -> dict[str, Any]:
    return {"base": str(reference.folder), "data": str(photos), "prompt": "a fox", "size": 64, "previews": ("a fox",)}


ALSO = pytest.mark.slow  # the same in other ways


@pytest.mark.parametrize(
    ("reference", "layers"),
    [
        ("1", "attention"),
        ("xl", "all"),
        *(pytest.param(*both, marks=ALSO) for both in (("2", "all"), ("1", "all"), ("1", "linear"), ("xl", "linear"))),
    ],
    indirect=["reference"],
)
def test_diffusers_draws_with_a_lora_that_was_trained_here(layers: str, reference: Any, photos: Path, tmp_path: Path) -> None:
    """Text encoders and convolutions too."""
    recipe = LoraRecipe(**of(reference, photos), rank=2, alpha=3.0, layers=layers, text=layers == "all")
    lora.train(recipe, LOOP, tmp_path / "run")
    pipe = again(reference)
    plain = theirs(pipe, num_inference_steps=4, width=64, height=64)
    pipe.load_lora_weights(tmp_path / "run", weight_name="model-000000.008k.safetensors", adapter_name="it")
    expected = theirs(pipe, num_inference_steps=4, width=64, height=64)
    assert np.abs(expected - plain).max() > 0.02, "a LoRA without effect would prove nothing"
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, steps=4, lora=(str(tmp_path / "run"),))
    with model.changed(request):  # type: ignore[attr-defined]
        assert np.abs(drawn(model, request) - expected).max() <= 1e-4


@pytest.mark.parametrize("reference", ["1", pytest.param("2", marks=ALSO)], indirect=True)
def test_diffusers_knows_a_word_that_was_trained_here(reference: Any, photos: Path, tmp_path: Path) -> None:
    recipe = EmbeddingRecipe(**of(reference, photos), word="fox", like="cat", vectors=2)
    embedding.train(recipe, LOOP, tmp_path / "run")
    pipe = again(reference)
    plain = theirs(pipe, num_inference_steps=4, width=64, height=64)
    pipe.load_textual_inversion(str(tmp_path / "run" / "model-000000.008k.safetensors"), token="<fox>")
    said = (REQUEST.prompt or "").replace("fox", "<fox>")
    assert said != REQUEST.prompt
    expected = theirs(pipe, num_inference_steps=4, width=64, height=64, prompt=said)
    assert np.abs(expected - plain).max() > 0.002
    model = load(reference.folder, device="cpu")
    request = replace(REQUEST, steps=4, embedding=(str(tmp_path / "run"),))
    with model.changed(request):  # type: ignore[attr-defined]
        assert np.abs(drawn(model, request) - expected).max() <= 1e-4


@pytest.mark.parametrize("reference", ["xl", *(pytest.param(kind, marks=ALSO) for kind in ("1", "2"))], indirect=True)
def test_a_model_that_was_tuned_here_is_what_its_export_is(reference: Any, photos: Path, tmp_path: Path) -> None:
    """The run's file draws, and the folder that is written of it draws the same in diffusers."""
    recipe = FinetuneRecipe(**of(reference, photos), text=True)
    finetune.train(recipe, replace(LOOP, lr=0.003), tmp_path / "run")
    write_folder(read_checkpoint(tmp_path / "run" / "model-000000.008k.safetensors"), tmp_path / "folder")
    expected = theirs(again(replace(reference, folder=tmp_path / "folder")), num_inference_steps=4, width=64, height=64)
    assert np.abs(expected - theirs(again(reference), num_inference_steps=4, width=64, height=64)).max() > 0.002
    model = load(tmp_path / "run", device="cpu")
    assert np.abs(drawn(model, replace(REQUEST, steps=4)) - expected).max() <= 1e-3
