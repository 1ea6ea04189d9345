"""Whole checkpoints of Stable Diffusion: folders of diffusers and single files, read into networks that draw, and written in both layouts."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.codecs.autoencoder import Autoencoder
from sfumato.codecs.tiny import TinyAutoencoder
from sfumato.convert.checkpoint import read_tensors, write_tensors
from sfumato.convert.clip import clip_json, ears_of, of_diffusers, read_clip, read_tokenizer, text_tensors
from sfumato.convert.compvis import AVERAGED, MANY, UNET, VAE, from_unet, parted, to_unet, unet_config_of, vae_config_of
from sfumato.convert.diffusers import (
    SCALE,
    STEMS,
    codec_of,
    filled,
    left_out,
    read_json,
    read_unet,
    read_vae,
    scheduler_config,
    scheduler_json,
    unet_json,
    vae_json,
    vae_tensors,
)
from sfumato.convert.header import read_header
from sfumato.convert.taesd import read_tiny, read_tiny_folder
from sfumato.convert.taming import from_codec, from_diffusers
from sfumato.core.checkpoint import FileError, write_bytes
from sfumato.core.config import from_json
from sfumato.diffusion.discrete import SchedulerConfig
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.nn.memory import hand_back
from sfumato.text.clip import START
from sfumato.text.prompts import Ear

Version = Literal["1", "2", "xl"]
SIZES = {"1": 512, "2": 768, "xl": 1024}  # sides of what each was trained on
CONTEXTS = {768: "1", 1024: "2"}
SCALES = {"1": SCALE, "2": SCALE, "xl": 0.13025}  # of latents
TUNED_KIND = "stable-diffusion"  # of files that were tuned here
FILTERS = ("safety_checker", "watermark")
AVERAGED_NOTE = "holds no averages: its usual weights draw"
V_MARK, SNR_MARK = "v_pred", "ztsnr"  # empty tensors by which some checkpoints say what they predict
PIPELINES = {"1": "StableDiffusionPipeline", "2": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
REFUSED = {  # beginnings or parts of names, and what they are of
    "model.diffusion_model.joint_blocks": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "controlnet_cond_embedding.": "a ControlNet",
    "input_hint_block.": "a ControlNet",
    "ip_adapter.": "an IP-Adapter",
    "image_proj.": "an IP-Adapter",
}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `notes` are to be told to whoever loads it. `quiet`: where nothing negative is said, guidance leans on zeros and not
    on an empty prompt, as XL learned it.
    """

    unet: UNet
    codec: Autoencoder | TinyAutoencoder
    ears: list[Ear]
    scheduler: SchedulerConfig
    version: Version
    size: int
    notes: tuple[str, ...] = ()
    quiet: bool = False

    @property
    def inpaints(self) -> bool:
        """Whether the UNet sees a mask and the picture without what is masked."""
        return self.unet.config.channels == 2 * self.unet.config.out_channels + 1


def version_of(unet: UNet, source: object) -> Version:
    """Raises FileError for a UNet that sees other things beside the picture than a mask."""
    c = unet.config
    if c.channels not in (c.out_channels, 2 * c.out_channels + 1):
        raise FileError(f"{source} has a UNet of {c.channels} channels, as of InstructPix2Pix or a depth model: those of 4 and of 9 are read")
    return "xl" if c.pooled else CONTEXTS.get(c.context, "1")  # type: ignore[return-value]


def refuse(names: Any, source: object) -> None:
    """Raises FileError for networks that are known by their names and not read."""
    for name in names:
        for mark, what in REFUSED.items():
            if name.startswith(mark):
                raise FileError(f"{source} is {what}: that is not read; Stable Diffusion 1.x, 2.x and XL are")


def read_checkpoint(
    path: Path,
    *,
    prediction: Literal["auto", "eps", "v"] = "auto",
    averaged: bool = False,
    variant: str | None = None,
    vae: Path | None = None,
) -> Checkpoint:
    """A folder of diffusers or a single file. `prediction` decides where a file cannot; `averaged` takes a file's EMA weights, `vae` is another
    autoencoder.

    Raises FileError with one clear line.
    """
    found = _folder(path, variant, vae) if path.is_dir() else _single(path, prediction, averaged, vae)
    if averaged and path.is_dir():
        found = replace(found, notes=(*found.notes, f"{path} {AVERAGED_NOTE}"))
    if prediction != "auto" and found.scheduler.prediction != prediction:
        found = replace(found, scheduler=replace(found.scheduler, prediction=prediction))
    return replace(found, notes=found.notes + _not_finite(found, path))


def _not_finite(found: Checkpoint, path: Path) -> tuple[str, ...]:
    """A note of how many numbers are none. A sum, which is quick, tells whether there are any to be counted."""
    count = 0
    for network in (found.unet, found.codec, *(e.network for e in found.ears)):
        values = [v for v in network.state_dict().values() if v.is_floating_point()]
        count += sum(int((~torch.isfinite(v)).sum()) for v in values if not math.isfinite(v.sum(dtype=torch.float32)))
        hand_back(network)
    return (f"{count:,} numbers in {path} are not finite: what it draws may be black; get it again",) if count else ()


# --- folders --------------------------------------------------------------------------------------------------------------------------------------


def _folder(path: Path, variant: str | None, vae: Path | None) -> Checkpoint:
    index = read_json(path / "model_index.json")
    kind = str(index.get("_class_name", ""))
    if not kind.startswith("StableDiffusion") or "3" in kind:
        raise FileError(f"{path} is of {kind or 'no pipeline'}: StableDiffusionPipeline and StableDiffusionXLPipeline, and their kinds, are read")
    if index.get("controlnet", [None])[0]:
        raise FileError(f"{path} holds a ControlNet: that is not read; Stable Diffusion 1.x, 2.x and XL are")
    unet = read_unet(path / "unet", variant)
    version = version_of(unet, path)
    codec = read_codec(vae, version) if vae else read_tiny_folder(path / "vae") or read_vae(path / "vae", variant)
    told = read_json(path / "scheduler" / "scheduler_config.json")
    scheduler = scheduler_config(told, path / "scheduler" / "scheduler_config.json")
    if version != "xl":
        scheduler = replace(scheduler, offset=1)  # as the pipeline has it, whatever its config says
    ears = []
    for ending in ("", "_2"):
        if (path / f"text_encoder{ending}").is_dir():
            tokenizer, pad = read_tokenizer(path / f"tokenizer{ending}")
            network = read_clip(path / f"text_encoder{ending}", variant)
            ears.append(Ear(network, tokenizer, pad, 2, False) if version == "xl" else Ear(network, tokenizer, pad))
    if not ears:
        raise FileError(f"{path} has no text_encoder folder: get the whole checkpoint")
    if version == "xl" and len(ears) == 1:
        raise FileError(f"{path} has one text encoder: the refiner of Stable Diffusion XL is not read, its base is")
    quiet = version == "xl" and bool(index.get("force_zeros_for_empty_prompt", True))
    side = read_json(path / "unet" / "config.json").get("sample_size") or 0
    side = side if isinstance(side, int) else SIZES[version] // codec.spec.factor
    notes = [f"{path} comes with a {name}, which is not applied" for name in FILTERS if index.get(name, [None])[0]]
    if odd := left_out(told):
        notes.append(f"{', '.join(odd)} of its scheduler_config.json is not here: {scheduler.sampler} draws without it")
    return Checkpoint(unet, codec, ears, scheduler, version, side * codec.spec.factor or SIZES[version], tuple(notes), quiet)


def write_folder(found: Checkpoint, path: Path, *, half: bool = False) -> None:
    """A folder that diffusers loads; `model_index.json`, without which it is none, comes last. Raises FileError."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        index = _write_parts(found, part, half)
        for file in sorted(p for p in part.rglob("*") if p.is_file()):
            target = path / file.relative_to(part)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
        _json(path / "model_index.json", index)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_parts(found: Checkpoint, path: Path, half: bool) -> dict[str, Any]:
    """Everything but the index, which is given back."""
    codec = _whole_codec(found)

    def put(name: str, config: dict[str, Any], tensors: dict[str, Tensor], stem: str) -> None:
        (path / name).mkdir(parents=True, exist_ok=True)
        _json(path / name / "config.json", config)
        _save(tensors, path / name / f"{stem}.safetensors", half)

    put("unet", unet_json(found.unet.config) | {"sample_size": found.size // found.codec.spec.factor}, found.unet.state_dict(), STEMS[0])
    put("vae", vae_json(codec), vae_tensors(codec), STEMS[0])
    index: dict[str, Any] = {
        "_class_name": _pipeline(found), "_diffusers_version": "0.30.0", "scheduler": ["diffusers", scheduler_json(found.scheduler)["_class_name"]],
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    }  # fmt: skip
    index |= (
        {"force_zeros_for_empty_prompt": found.quiet}
        if found.version == "xl"
        else {"safety_checker": [None, None], "feature_extractor": [None, None]}
    )
    for ear, ending in zip(found.ears, ("", "_2"), strict=False):
        network = of_diffusers(ear) if len(found.ears) == 1 else ear.network
        named = {f"text_model.{k}" if not k.startswith("text_projection") else k: v for k, v in network.state_dict().items()}
        put(f"text_encoder{ending}", clip_json(network.config) | {"bos_token_id": ear.start}, named, STEMS[1])
        _tokenizer(ear, path / f"tokenizer{ending}")
        index |= {f"text_encoder{ending}": ["transformers", clip_json(network.config)["architectures"][0]]}
        index |= {f"tokenizer{ending}": ["transformers", "CLIPTokenizer"]}
    (path / "scheduler").mkdir(exist_ok=True)
    _json(path / "scheduler" / "scheduler_config.json", scheduler_json(found.scheduler))
    return index


def _whole_codec(found: Checkpoint) -> Autoencoder:
    if isinstance(found.codec, TinyAutoencoder):
        raise FileError("a checkpoint with a tiny autoencoder is not written: name one with the whole autoencoder")
    return found.codec


def _pipeline(found: Checkpoint) -> str:
    kind = PIPELINES[found.version]
    return kind.replace("Pipeline", "InpaintPipeline") if found.inpaints else kind


def _tokenizer(ear: Ear, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    told = json.loads(ear.tokenizer.to_str())["model"]
    _json(folder / "vocab.json", told["vocab"])
    merges = [" ".join(m) if isinstance(m, list) else m for m in told["merges"]]
    write_bytes(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    end, pad = (ear.tokenizer.id_to_token(i) for i in (ear.end, ear.pad))
    names = {"bos_token": START, "eos_token": end, "unk_token": end, "pad_token": pad}
    _json(folder / "special_tokens_map.json", names)
    _json(folder / "tokenizer_config.json", names | {"tokenizer_class": "CLIPTokenizer", "model_max_length": ear.room + 2, "do_lower_case": True})


def _json(path: Path, value: dict[str, Any]) -> None:
    write_bytes(path, json.dumps(value, indent=2).encode())


def _save(tensors: dict[str, Tensor], path: Path, half: bool) -> None:
    write_tensors({k: v.half() if half and v.is_floating_point() else v for k, v in tensors.items()}, path, {"format": "pt"})


# --- single files ---------------------------------------------------------------------------------------------------------------------------------


def _single(path: Path, prediction: str, averaged: bool, other: Path | None) -> Checkpoint:
    tensors = read_tensors(path)
    refuse(tensors, path)
    parts = parted(tensors, averaged)
    if not parts["unet"]:
        raise FileError(f"{path} holds no UNet of Stable Diffusion (no tensor begins with {UNET}): sfumato info {path} says what it is")
    params, own = _settings(path), _said_by_us(path)
    told = (params.get("unet_config") or {}).get("params") or {}
    config = from_json(UNetConfig, own["unet"], "unet") if own else unet_config_of(parts["unet"], told)
    unet = filled(UNet, config, to_unet(parts["unet"], config), path)
    version = version_of(unet, path)
    if not parts["vae"] and other is None:
        raise FileError(f"{path} holds no autoencoder (no tensor begins with {VAE}): name one with --vae")
    vae = {k: v for k, v in parts["vae"].items() if not k.startswith(("loss.", "model_ema"))}
    codec = read_codec(other, version) if other else _codec(vae, float(params.get("scale_factor", SCALES[version])), path)
    guess, notes = _predicts(version, unet, tensors, params, path) if prediction == "auto" else (prediction, ())
    base = SchedulerConfig()
    scheduler = replace(base, prediction=guess, path=replace(base.path, zero_snr=SNR_MARK in tensors and guess == "v"))
    size, quiet = 512 if version == "2" and guess == "eps" else SIZES[version], version == "xl"
    if own:
        scheduler, size, quiet = scheduler_config(own["scheduler"], path), own["size"], own["quiet"]
    if averaged and sum(k.startswith(AVERAGED) for k in tensors) <= MANY:
        notes = (*notes, f"{path} {AVERAGED_NOTE}")
    return Checkpoint(unet, codec, ears_of(parts["text"], path), scheduler, version, size, () if own else notes, quiet)


def _said_by_us(path: Path) -> dict[str, Any]:
    """What a file that was tuned here says of itself; nothing of others."""
    said = read_header(path)[1] if path.suffix == ".safetensors" else {}
    if said.get("kind") != json.dumps(TUNED_KIND):
        return {}
    try:
        return {k: json.loads(said[k]) for k in ("unet", "scheduler", "size", "quiet")}
    except (KeyError, ValueError):
        raise FileError(f"{path} does not say how it was tuned: it is damaged, or was written by another program; get it again") from None


def read_codec(path: Path, version: Version = "1") -> Autoencoder | TinyAutoencoder:
    """The autoencoder alone: a `vae` folder, a single file of it or with it, or a tiny one (TAESD). No file says how latents are scaled: as `version`
    has it.

    Raises FileError.
    """
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        return read_tiny_folder(folder) or read_vae(folder)
    tensors = read_tensors(path)
    refuse(tensors, path)
    if (tiny := read_tiny(path, tensors)) is not None:
        return tiny
    known = next((p for p in (VAE, "vae.", "") if f"{p}encoder.conv_in.weight" in tensors), None)
    if known is None:
        raise FileError(f"{path} holds no autoencoder of Stable Diffusion: there is no encoder.conv_in.weight in it")
    own = {k.removeprefix(known): v for k, v in tensors.items() if k.startswith(known)}
    if "encoder.conv_norm_out.weight" in own:
        levels = 1 + max(int(k.split(".")[2]) for k in own if k.startswith("encoder.down_blocks."))
        blocks = 1 + max(int(k.split(".")[4]) for k in own if k.startswith("encoder.down_blocks.0.resnets."))
        own = from_diffusers(own, levels, blocks)
    kept = {k: v for k, v in own.items() if k.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))}
    return _codec(kept, SCALES[version], path)


def _codec(tensors: dict[str, Tensor], scale: float, path: Path) -> Autoencoder:
    """By its authors' names, its latents times `scale`."""
    config = vae_config_of(tensors)
    channels = config.bottleneck.channels
    return codec_of(config, tensors, {"mean": [0.0] * channels, "std": [1 / scale] * channels}, path)


def _settings(path: Path) -> dict[str, Any]:
    """`model.params` of the YAML that has the file's name; nothing without one. Raises FileError where that is no config of Stable Diffusion."""
    told = next((p for p in (path.with_suffix(".yaml"), path.with_suffix(".yml")) if p.exists()), None)
    if told is None:
        return {}
    try:
        import yaml
    except ImportError:
        raise FileError(f"{told} says how {path.name} is made, and needs PyYAML to be read: pip install pyyaml, or move it away") from None
    try:
        return dict(yaml.safe_load(told.read_text(encoding="utf-8"))["model"]["params"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise FileError(f"{told} beside {path.name} is no config of Stable Diffusion: move it away to read the checkpoint without it") from None


def _predicts(version: Version, unet: UNet, tensors: dict[str, Tensor], params: dict[str, Any], path: Path) -> tuple[Any, tuple[str, ...]]:
    """eps or v: by a mark or the YAML beside it; what no file of its kind says otherwise; a guess, with a note."""
    if V_MARK in tensors:
        return "v", ()
    if "parameterization" in params:
        return ("v" if params["parameterization"] == "v" else "eps"), ()
    if version != "2" or unet.config.channels != unet.config.out_channels:
        return "eps", ()
    return "v", (f"{path} does not say whether it predicts v or eps: v is taken, as of 2.1 at 768; give --prediction eps if pictures are noise",)


def single_tensors(found: Checkpoint) -> dict[str, Tensor]:
    """What one file holds in the layout of its authors, which other programs load."""
    tensors = {UNET + k: v for k, v in from_unet(found.unet.state_dict(), found.unet.config).items()}
    tensors |= {VAE + from_codec(k, gumbel=False): v for k, v in _whole_codec(found).state_dict().items() if not k.startswith("latent_")}
    tensors |= text_tensors(found.ears)
    if found.scheduler.prediction == "v":
        tensors[V_MARK] = torch.zeros(0)
    if found.scheduler.path.zero_snr:
        tensors[SNR_MARK] = torch.zeros(0)
    return tensors


def write_single(found: Checkpoint, path: Path, *, half: bool = False) -> None:
    """One file; see `single_tensors`."""
    _save(single_tensors(found), path, half)
