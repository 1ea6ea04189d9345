"""`sfumato lora`: what a LoRA is, a model with LoRAs merged into it, and a LoRA of how two models differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from sfumato.core.checkpoint import FileError
from sfumato.core.language import translated
from sfumato.pipelines.find import find, named_file, strength_of

SHOWN = ("base", "prompt", "style", "until", "along", "images")  # of what our files say of themselves


@dataclass(frozen=True)
class Info:
    """Says what a LoRA changes, and how much."""

    file: Annotated[Path, tyro.conf.Positional]
    """A LoRA file, or a run of `sfumato train lora`."""


def run_info(asked: Info) -> Iterator[str]:
    from sfumato.convert.about import about
    from sfumato.convert.kohya import said_of

    path = named_file(asked.file)
    facts, kind = about(path), said_of(path, "kind")
    what = facts["what"] if kind in (None, "lora") else kind  # networks of ours have layers that are called as parts of LoRAs are
    if what != "LoRA":
        raise FileError(f"{path} is no LoRA but {what}: sfumato info says what a file is")
    if kind == "lora":
        facts |= {k: v for k in SHOWN if (v := said_of(path, k)) not in (None, "")}
    for name, value in facts.items():
        yield f"{name}: {value}"


@dataclass(frozen=True)
class Merge:
    """Writes a model with LoRAs merged into it: it draws as the model does with them, and needs no file beside it."""

    model: Annotated[str, tyro.conf.Positional]
    """A model of ours that draws by diffusion, or a checkpoint of Stable Diffusion."""
    loras: Annotated[tuple[str, ...], tyro.conf.Positional]
    """LoRA files with their strengths: a.safetensors:0.8."""
    out: Path
    """The file to write; a folder of diffusers where it has no ending, of checkpoints of Stable Diffusion."""
    half: bool = False
    """In half precision: half as large."""
    force: bool = False
    """Overwrite a file."""


def run_merge(asked: Merge) -> Iterator[str]:
    from sfumato.convert.kohya import read_lora
    from sfumato.convert.stable import write_folder, write_single
    from sfumato.core.pack import compress, save_pack
    from sfumato.nn.lora import merge
    from sfumato.pipelines.stable_diffusion import StableDiffusion
    from sfumato.pipelines.stored import checkpoint_of, stored

    if not asked.loras:
        raise ValueError("lora (=none) must be named: sfumato lora merge MODEL LORA:0.8 --out FILE")
    _check_target(asked.out, asked.force)
    model = _loaded(asked.model)
    networks = model.changeable
    for told in asked.loras:
        path, strength = strength_of(told)
        lora = read_lora(path, networks)
        if lora.until < 1:
            raise ValueError(f"{path} is at work from the time {lora.until} on only, which weights cannot say: name it with --lora when drawing")
        for name, changes in lora.changes.items():
            merge(networks[name], [(changes, strength)])
    if isinstance(model, StableDiffusion) and not asked.out.suffix:
        write_folder(checkpoint_of(model), asked.out, half=asked.half)
    elif isinstance(model, StableDiffusion):
        write_single(checkpoint_of(model), asked.out, half=asked.half)
    else:
        tensors, meta = stored(model)
        save_pack(asked.out, compress(tensors) if asked.half else tensors, meta)
    yield str(asked.out)


@dataclass(frozen=True)
class Extract:
    """Writes a LoRA of how one model differs from another of the same kind: the nearest changes of a low rank."""

    tuned: Annotated[str, tyro.conf.Positional]
    """The model that was changed."""
    base: Annotated[str, tyro.conf.Positional]
    """The model that it was."""
    out: Path
    """The file to write."""
    rank: int = 32
    """Of the changes: more is nearer and larger."""
    layers: str = "linear"
    """attention, linear, all (with convolutions), or a regular expression on the names of layers."""
    force: bool = False
    """Overwrite a file."""


def run_extract(asked: Extract) -> Iterator[str]:
    from sfumato.convert.kohya import Lora, write_lora
    from sfumato.nn.lora import difference

    if asked.rank < 1:
        raise ValueError(f"rank (={asked.rank}) must be at least 1: 4 to 128 are usual")
    _check_target(asked.out, asked.force)
    tuned, base = (_loaded(m).changeable for m in (asked.tuned, asked.base))
    if tuned.keys() != base.keys():
        raise ValueError(f"tuned (={asked.tuned!r}) and base (={asked.base!r}) must be models of the same kind")
    changes: dict[str, Any] = {}
    kept = left = 0.0
    for name in base:
        try:
            layers = "all" if name == "decoder" else asked.layers  # which has no attention
            found, (of, rest) = difference(tuned[name], base[name], layers, asked.rank)
        except RuntimeError:
            raise ValueError(f"tuned (={asked.tuned!r}) and base (={asked.base!r}) must be models of the same kind") from None
        kept, left = kept + of, left + rest
        if found:
            changes[name] = found
    if not changes:
        raise ValueError(f"tuned (={asked.tuned!r}) does not differ from base (={asked.base!r}) in the layers {asked.layers!r}")
    write_lora(Lora(changes, {}), asked.out)
    share = 1 - math.sqrt(left / kept)
    yield translated(f"{sum(map(len, changes.values()))} layers; {share:.1%} of how they differ is in it")
    yield str(asked.out)


def _loaded(model: str) -> Any:
    from sfumato.pipelines.latent_diffusion import LatentDiffusion
    from sfumato.pipelines.load import load

    found = load(find(model), device="cpu", dtype="fp32", engine="eager")
    if not isinstance(found, LatentDiffusion):
        raise ValueError(f"model (={model!r}) must draw by diffusion: there are no LoRAs of others")
    return found


def _check_target(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise FileError(f"{path} exists: use --force to overwrite it, or another --out")


ACTIONS = {"info": (Info, run_info), "merge": (Merge, run_merge), "extract": (Extract, run_extract)}
