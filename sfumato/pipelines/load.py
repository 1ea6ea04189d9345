"""From a file to something that draws."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from sfumato import zoo
from sfumato.codecs.upscaler import Upscaler, drawn_by
from sfumato.convert.header import read_header
from sfumato.convert.stable import TUNED_KIND, read_checkpoint
from sfumato.core.checkpoint import FileError, cache_folder, read_metadata, write_bytes
from sfumato.core.config import from_json
from sfumato.core.language import translated
from sfumato.core.pack import load_pack
from sfumato.core.request import Device
from sfumato.diffusion.path import PathConfig, make_path
from sfumato.metrics.judge import Judge
from sfumato.nn.engine import Engine, EngineName, choose_engine
from sfumato.nn.layers import Unfilled
from sfumato.nn.memory import keep_halves, keep_pages, moved
from sfumato.pipelines.codes import CodesModel
from sfumato.pipelines.find import bundled, find, name_of
from sfumato.pipelines.gan import GANModel
from sfumato.pipelines.generate import Model
from sfumato.pipelines.latent_diffusion import LatentDiffusion
from sfumato.pipelines.stable_diffusion import StableDiffusion

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Asked = Literal["auto", "eps", "v"]
LARGE, PIECE = 2**26, 2**22  # bytes of a file whose hash is kept, and that are read at once
DRAWING = {  # kinds of packs: their generator, the other networks that it draws with, what else they say
    "latent-diffusion": ("denoiser", ("codec",), ("path", "prediction")),
    "codes": ("prior", ("codec",), ()),
    "gan": ("generator", (), ()),
}


def choose_device(device: Device) -> torch.device:
    """auto: cuda, then mps, then cpu."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return torch.device(next(d for d in ("cuda", "mps", "cpu") if present[d]))
    if not present[device]:
        raise ValueError(f"device (={device!r}) is not available here: use one of {', '.join(d for d, p in present.items() if p)}, or auto")
    return torch.device(device)


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto: fp32 on the CPU and on MPS, bf16 on cuda where the card has it. Raises ValueError."""
    if dtype not in get_args(Dtype):
        raise ValueError(f"dtype (={dtype!r}) must be one of {', '.join(get_args(Dtype))}")
    if dtype == "auto":
        dtype = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if dtype == "fp16" and device.type == "cpu":
        raise ValueError("dtype (='fp16') is not for the CPU: use fp32 or bf16 there")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def load(
    model: str | Path | None = None,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: int = 0,
    prediction: Asked = "auto",
    vae: str | Path | None = None,
    averaged: bool = False,
    variant: str | None = None,
    guide: str | Path | None = None,
    engine: EngineName = "auto",
    low_memory: bool = False,
) -> Model:
    """Loads the bundled model, or the named one, ready to draw: one of ours, or a checkpoint of Stable Diffusion, a folder of diffusers or a single
    file. Of those, `prediction` is for files that do not say what they predict, `vae` another autoencoder (a tiny one, too), `averaged` takes the
    averages (EMA) of a single file, `variant` the files of a folder that are called so ("fp16"), and `low_memory` keeps weights of 16 bits so in
    memory, to compute in fp32 a layer at a time. `guide` is a weaker model of the same latents for guidance to lean on (arXiv 2406.02507). `engine`
    computes the networks: auto, eager, openvino or compile (see sfumato.nn.engine). Raises FileError or ValueError with one clear line.
    """
    if threads < 0:
        raise ValueError(f"threads (={threads}) must be at least 0: 0 leaves the choice to torch")
    if threads:
        torch.set_num_threads(threads)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    stable = Stable(prediction=prediction, vae=None if vae is None else Path(vae), averaged=averaged, variant=variant)
    computing = Computing(engine=engine, low_memory=low_memory)
    found = _load(find(model), where, kind, stable, computing)
    keep_pages()  # after the weights, which would take the room
    if guide is None:
        return found
    weaker = _load(find(guide, "guide"), where, kind, computing=replace(computing, low_memory=False))
    return guided_by(found, weaker, guide)


@dataclass(frozen=True, kw_only=True)
class Computing:
    """How networks are to be computed; see `load`."""

    engine: EngineName = "auto"
    low_memory: bool = False

    def name_for(self, denoiser: torch.nn.Module, device: torch.device, kind: torch.dtype) -> EngineName:
        """The engine of a model. Raises ValueError for one that is not to be had."""
        if self.low_memory and self.engine not in ("auto", "eager"):
            raise ValueError(f"engine (={self.engine!r}) holds weights in 32 bits: leave it or low_memory out")
        if self.low_memory and (device.type != "cpu" or kind != torch.float32):
            raise ValueError("low_memory (=True) is for fp32 on a CPU: leave it out, or name --device cpu --dtype fp32")
        return choose_engine("eager" if self.low_memory else self.engine, device, kind, sum(p.numel() for p in denoiser.parameters()))

    def made(self, name: EngineName, *networks: torch.nn.Module) -> Engine:
        return Engine(name, networks, willing=self.engine == "auto")


@dataclass(frozen=True, kw_only=True)
class Stable:
    """What is asked of a checkpoint of Stable Diffusion, beside its path; see `load`."""

    prediction: Asked = "auto"
    vae: Path | None = None
    averaged: bool = False
    variant: str | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What a picture's record says of it."""
        return {f.name: str(v) if isinstance(v, Path) else v for f in fields(self) if (v := getattr(self, f.name)) != f.default}


def guided_by(model: Model, weaker: Model, named: str | Path) -> Model:
    """The model with another one that its guidance leans on. Raises ValueError where it cannot."""
    if not (isinstance(model, LatentDiffusion) and isinstance(weaker, LatentDiffusion)):
        raise ValueError(f"guide (={str(named)!r}) and the model must both draw by diffusion")
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    same = {
        "latents": model.codec.spec == weaker.codec.spec,  # type: ignore[union-attr]
        "times": torch.equal(model.path.alpha(t), weaker.path.alpha(t)),
        "inputs": getattr(model, "inpaints", None) == getattr(weaker, "inpaints", None),
    }
    if different := [what for what, so in same.items() if not so]:
        raise ValueError(
            f"guide (={str(named)!r}) must have the {different[0]} that the model has: name an earlier checkpoint of it, or a smaller one of its kind"
        )
    weaker = replace(weaker, codec=model.codec)  # which it does not draw with
    said = model.meta.get("with", {}) | {"guide": str(named), "guide_hash": weaker.meta["hash"]}
    return replace(model, guide=weaker, meta=model.meta | {"with": said})  # type: ignore[call-arg]


def _load(path: Path, where: torch.device, kind: torch.dtype, stable: Stable = Stable(), computing: Computing = Computing()) -> Model:
    if is_stable(path):
        return load_stable(path, where, kind, stable, computing)
    if computing.low_memory:
        raise ValueError("low_memory (=True) is for checkpoints of Stable Diffusion: leave it out")
    if given := next(iter(stable.said.items()), None):
        raise ValueError(f"{given[0]} (={given[1]!r}) must be left out: it is for checkpoints of Stable Diffusion")
    tensors, meta = load_pack(path)
    if meta["kind"] in ("lora", "embedding"):
        raise FileError(f"{path} is what sfumato train {meta['kind']} learned: name it with --{meta['kind']} beside the model that it is of")
    if meta["kind"] not in DRAWING:
        raise FileError(f"{path} is of kind {meta['kind']!r} and does not draw by itself: name a run of `sfumato train diffusion`, prior or gan")
    part, others, needed = DRAWING[meta["kind"]]
    if missing := [k for k in (*needed, *others, part, "size", "styles", "labels", "words") if k not in meta]:
        raise FileError(f"{path} lacks {', '.join(missing)} in its metadata: it was not written whole, or not by sfumato")
    networks = {name: _empty(meta[name]) for name in (*others, part)}
    if "text" in meta:
        networks["text"] = _empty(meta["text"], meta["tokenizer"])
    spare = {"discriminator"} if part == "generator" else set()  # which draws nothing
    foreign = [k for k in tensors if k.partition(".")[0] not in networks.keys() | spare]
    if foreign:
        raise FileError(f"{path} holds tensors that belong to nothing it describes: {', '.join(foreign[:3])}")
    for name, network in networks.items():
        networks[name] = zoo.load_into(network, tensors, f"{name}.").to(where)
    networks[part].to(kind)
    common: dict[str, Any] = {"text": networks.get("text"), "meta": meta, "name": name_of(path), "device": where, "dtype": kind}
    if part != "denoiser" and computing.engine not in ("auto", "eager"):
        print(translated(f"warning: engine {computing.engine} has no effect: it is for models that draw by diffusion"), file=sys.stderr)
    if part == "generator":
        return GANModel(generator=networks[part], **common)
    upscaler, digest = upscaler_for(networks["codec"])
    common |= {"codec": networks["codec"], "upscaler": None if upscaler is None else upscaler.to(where), "upscaler_hash": digest}
    if part == "prior":
        return CodesModel(prior=networks[part], **common)
    engine = computing.made(computing.name_for(networks[part], where, kind), networks[part], networks["codec"])
    return LatentDiffusion(denoiser=networks[part], engine=engine, path=make_path(from_json(PathConfig, meta["path"], "path")), **common)


def is_stable(path: Path) -> bool:
    """Whether a path is of Stable Diffusion rather than one of our packs."""
    if path.is_dir() or path.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return True
    said = read_header(path)[1] if path.suffix == ".safetensors" else {"hash": ""}
    return "hash" not in said or said.get("kind") == json.dumps(TUNED_KIND)


def load_stable(path: Path, device: torch.device, kind: torch.dtype, asked: Stable, computing: Computing) -> StableDiffusion:
    """A checkpoint of Stable Diffusion, ready to draw; what is to be known of it goes to stderr. Where memory is little, and where graphs are made of
    them, weights of 16 bits stay so.
    """
    found = read_checkpoint(path, prediction=asked.prediction, averaged=asked.averaged, variant=asked.variant, vae=asked.vae)
    said = asked.said | ({} if asked.vae is None else {"vae_hash": file_hash(asked.vae)})
    if found.codec.spec.latent_channels != found.unet.config.out_channels:
        raise ValueError(
            f"vae (={str(asked.vae)!r}) has latents of {found.codec.spec.latent_channels} channels, the model of {found.unet.config.out_channels}: "
            "it is of another kind of model"
        )
    for note in found.notes:
        print(translated(f"note: {note}"), file=sys.stderr)
    engine = computing.name_for(found.unet, device, kind)
    halves = computing.low_memory or engine == "openvino"
    if computing.low_memory and all(p.element_size() > 2 for p in found.unet.parameters()):
        print(
            translated("warning: low_memory has no effect: the weights of this file have 32 bits; sfumato convert --half makes it one of 16"),
            file=sys.stderr,
        )
    place = (lambda network, kind: keep_halves(network)) if halves else (lambda network, kind: moved(network, device, kind))
    for ear in found.ears:
        place(ear.network, torch.float32)
    meta = {"kind": "stable-diffusion", "version": found.version, "size": found.size, "styles": [], "labels": [], "words": {}, "filler": [],
            "hash": file_hash(path), "prediction": found.scheduler.prediction, "with": said}  # fmt: skip
    unet, codec = place(found.unet, kind), place(found.codec, torch.float32)
    return StableDiffusion(
        denoiser=unet, codec=codec, engine=computing.made(engine, unet, codec), ears=found.ears, scheduler=found.scheduler,
        path=found.scheduler.made, inpaints=found.inpaints, quiet=found.quiet, text=None, meta=meta, device=device, dtype=kind,
        name=name_of(path),
    )  # fmt: skip


def file_hash(path: Path) -> str:
    """sha256 of a file, as other programs say which model drew a picture; of a folder that of its tensors, configs and words one after the other."""
    if path.is_file():
        return _digest(path)
    files = sorted(p for p in path.rglob("*") if p.suffix in (".safetensors", ".bin", ".json") or p.name == "merges.txt")
    return hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()


def _digest(file: Path) -> str:
    """Of a large file it is kept in the cache folder, by the file's place, size and time."""
    told = file.stat()
    large, key = told.st_size > LARGE, f"{os.path.realpath(file)}\0{told.st_size}\0{told.st_mtime_ns}"
    kept = cache_folder() / f"hash-{hashlib.sha256(key.encode()).hexdigest()[:32]}.txt"
    if large and kept.exists() and re.fullmatch("[0-9a-f]{64}", found := kept.read_text(encoding="ascii", errors="replace")):
        return found
    digest = hashlib.sha256()
    with (
        file.open("rb", buffering=0) as f,
        tqdm(total=told.st_size, desc=translated("hashing, once"), unit="B", unit_scale=True, leave=False, disable=not large) as bar,
    ):
        while piece := f.read(PIECE):
            digest.update(piece)
            bar.update(len(piece))
    if large:
        with suppress(OSError):
            write_bytes(kept, digest.hexdigest().encode())
    return digest.hexdigest()


def _empty(config: dict[str, Any], *extra: Any) -> torch.nn.Module:
    """The network of a config without the time that first weights take."""
    with Unfilled():
        return zoo.make(config, *extra)


def load_judge(model: str | Path) -> Judge:
    """The judge in a run folder of `sfumato train judge`, or in a pack of one. Raises FileError."""
    path = find(model)
    tensors, meta = load_pack(path)
    if meta["kind"] != "judge" or not {"judge", "labels", "styles"} <= meta.keys():
        raise FileError(f"{path} holds no judge: name a run of `sfumato train judge`")
    network = zoo.load_into(zoo.make(meta["judge"]), tensors, "judge.")
    return Judge(network, meta["labels"], meta["styles"], meta["hash"], int(meta.get("images", 0)), meta.get("scores", {}))  # type: ignore[arg-type]


def upscaler_for(codec: torch.nn.Module) -> tuple[Upscaler | None, str | None]:
    """The bundled enlargement that was made for the pictures of this codec, with its hash, if there is one."""
    for path in bundled().values():
        meta = read_metadata(path)
        if meta.get("kind") == "upscaler" and meta.get("decoder") == drawn_by(codec):
            tensors, meta = load_pack(path)
            return zoo.load_into(zoo.make(meta["upscaler"]), tensors, "upscaler."), meta["hash"]  # type: ignore[return-value, arg-type]
    return None, None
