"""LoRA files: those of kohya's scripts, of diffusers and of peft, with the layers of our networks that they change; and learned words.

kohya names a layer by its path with underscores (of SDXL by its authors' names), `lora_down`, `lora_up` and `alpha`; diffusers and peft by its path
and `lora_A`, `lora_B`; older files of diffusers by attention processors. Those of our own models are written as kohya does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.convert.checkpoint import read_tensors, write_tensors
from sfumato.convert.compvis import from_unet
from sfumato.convert.header import read_header
from sfumato.convert.stable import refuse
from sfumato.core.checkpoint import FileError
from sfumato.nn.lora import Delta

UNET, TEXT, SECOND = "unet", "text_encoder", "text_encoder_2"  # what a file may change
DOWN = ("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight", "lora_linear_layer.down.weight", "down.weight")
UP = ("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight", "lora_linear_layer.up.weight", "up.weight")
OTHERS = {  # parts of names by which other methods are known
    "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "hada_w1": "a LoHa", "lokr_w1": "a LoKr", "oft_blocks": "an OFT",
    "lora_mid": "a LoRA of Tucker's form", "glora": "a GLoRA",
}  # fmt: skip
PROCESSOR = re.compile(r"\.(?:processor\.)?(to_q|to_k|to_v|to_out)_lora$")
MOST_ALONG = 4.0  # times what a LoRA changes
KOHYA = {
    "lora_unet_": UNET,
    "lora_te_": TEXT,
    "lora_te1_": TEXT,
    "lora_te2_": SECOND,
    "lora_denoiser_": "denoiser",
    "lora_text_": "text",
    "lora_decoder_": "decoder",
}


@dataclass(frozen=True)
class Lora:
    """Changes by network and layer, and what the file says of itself."""

    changes: dict[str, dict[str, Delta]]
    about: dict[str, str]

    @property
    def along(self) -> float:
        """How far pictures go along what it changes at a strength of 1, where it is at work from a time on."""
        return _number(self.about.get("along"), MOST_ALONG)

    @property
    def until(self) -> float:
        """The time, 1 noise and 0 clean, from which on it is at work."""
        return _number(self.about.get("until"))

    @property
    def rank(self) -> int:
        return max((len(d.down) for of in self.changes.values() for d in of.values()), default=0)


def read_lora(path: Path, networks: Mapping[str, nn.Module]) -> Lora:
    """A LoRA for these networks ("unet", "text_encoder", "text_encoder_2", or "denoiser", "text" and "decoder" of our own models). Raises FileError
    where it is none, or of another model.
    """
    tensors = read_tensors(path)
    about = read_header(path)[1] if path.suffix == ".safetensors" else {}
    refuse(tensors, path)
    for mark, what in OTHERS.items():
        if any(mark in name for name in tensors):
            raise FileError(f"{path} is {what}: that is not read; LoRAs of linear layers and convolutions are")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer, kind = _split(name)
        if kind is None:
            raise FileError(f"{path} is no LoRA: it holds {name[:80]}, which is neither a down, an up nor an alpha")
        parts.setdefault(layer, {})[kind] = value
    places, told = _places(networks), _told(about, path)
    changes: dict[str, dict[str, Delta]] = {}
    for layer, part in parts.items():
        if not {"down", "up"} <= part.keys():
            raise FileError(f"{path} holds only {' and '.join(sorted(part))} of {layer[:80]}: it was cut off")
        place = places.get(layer) or places.get(_plain(layer))
        if place is None:
            raise FileError(f"{path} changes {layer[:80]}, which this model does not have: it is of another kind of model")
        alpha = part["alpha"].flatten()[:2].tolist() if "alpha" in part else [_alpha(told, place, layer, len(part["down"]))]
        if len(alpha) != 1 or min(part["down"].ndim, part["up"].ndim) < 2 or not len(part["down"]):
            raise FileError(f"{path} is damaged: the shapes of what it changes of {layer[:80]} are none of a LoRA's")
        if not all(bool(torch.isfinite(v.sum(dtype=torch.float32))) for v in part.values()):
            raise FileError(f"{path} holds numbers that are not finite, of {layer[:80]}: get it again")
        delta = Delta(part["down"], part["up"], alpha[0])
        if not delta.fits(networks[place[0]].get_submodule(place[1])):
            raise FileError(
                f"{path} changes {layer[:80]} from {delta.down.shape[1]} to {len(delta.up)} numbers, which is not its shape: it is of another model"
            )
        changes.setdefault(place[0], {})[place[1]] = delta
    return Lora(changes, about)


def _number(said: str | None, most: float = 1.0) -> float:
    """From 0 to `most`; 1 where nothing is said."""
    try:
        return min(most, max(0.0, float(said or 1.0)))
    except ValueError:
        return 1.0


def _split(name: str) -> tuple[str, str | None]:
    """(layer, "down", "up" or "alpha")."""
    for kind, endings in (("down", DOWN), ("up", UP), ("alpha", ("alpha",))):
        for ending in endings:
            if name.endswith("." + ending):
                return name.removesuffix("." + ending), kind
    return name, None


def _plain(layer: str) -> str:
    """A path of an attention processor as that of the layer, with `unet.` before what says nothing."""
    layer = PROCESSOR.sub(lambda m: "." + m[1] + (".0" if m[1] == "to_out" else ""), layer)
    return layer if layer.startswith(("unet.", "text_encoder")) else f"unet.{layer}"


def _places(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """{every name of a layer: (network, our name)}."""
    found: dict[str, tuple[str, str]] = {}
    marks = {network: [mark for mark, of in KOHYA.items() if of == network] for network in networks}
    for network, module in networks.items():
        layers = [n for n, m in module.named_modules() if isinstance(getattr(m, "weight", None), Tensor)]
        between = "text_model." if network in (TEXT, SECOND) else ""
        for layer in layers:
            place = (network, layer)
            for full in {f"{network}.{between}{layer}", f"{network}.{layer}"}:
                found[full] = place
            for mark in marks[network]:
                found[mark + (between + layer).replace(".", "_")] = place
                found[mark + layer.replace(".", "_")] = place
            if between:  # older files of diffusers
                for q in ("q", "k", "v", "out"):
                    if layer.endswith(f"self_attn.{q}_proj"):
                        found[f"{network}.{between}{layer.removesuffix(f'{q}_proj')}to_{q}_lora"] = place
        if network == UNET:
            theirs = from_unet({f"{n}.weight": torch.empty(0) for n in layers}, module.config)  # type: ignore[arg-type]
            for layer, name in zip(layers, theirs, strict=True):
                found["lora_unet_" + name.removesuffix(".weight").replace(".", "_")] = (UNET, layer)
    return found


def _told(about: dict[str, str], path: Path) -> dict[str, Any]:
    """What peft's metadata says, {network.setting: value}. Raises FileError for kinds that are not read."""
    try:
        told: Any = json.loads(about.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return {}
    told = told if isinstance(told, dict) else {}
    if any(value for name, value in told.items() if name.endswith(".use_dora")):
        raise FileError(f"{path} is a DoRA: that is not read; LoRAs of linear layers and convolutions are")
    for name, patterns in told.items():
        if (
            name.endswith(".alpha_pattern")
            and isinstance(patterns, dict)
            and (odd := next((k for k in patterns if not re.fullmatch(r"[\w.]+", k)), None))
        ):
            raise FileError(f"{path} gives alphas by a regular expression ({odd[:40]!r}), which is not read: names of layers are")
    return told


def _alpha(told: dict[str, Any], place: tuple[str, str], layer: str, rank: int) -> float | None:
    """A layer's alpha by that metadata: a pattern's (the end of a layer's path), else the network's; `use_rslora` divides it by the root of the rank
    (arXiv 2312.03732).
    """
    network, _ = place
    alpha, patterns = told.get(f"{network}.lora_alpha"), told.get(f"{network}.alpha_pattern")
    path = layer.removeprefix(f"{network}.").removeprefix("text_model.")
    if isinstance(patterns, dict):
        alpha = next((v for k, v in patterns.items() if path == k or path.endswith(f".{k}")), alpha)
    if not isinstance(alpha, int | float):
        return None
    return float(alpha) * (rank**0.5 if told.get(f"{network}.use_rslora") else 1.0)


def lora_tensors(lora: Lora, layout: str = "kohya") -> dict[str, Tensor]:
    """What a file of it holds: `layout` "kohya" with diffusers' paths, or "peft". Raises ValueError for another."""
    tensors: dict[str, Tensor] = {}
    for network, changes in lora.changes.items():
        for layer, delta in changes.items():
            full = f"text_model.{layer}" if network in (TEXT, SECOND) else layer
            if layout == "kohya":
                mark = {TEXT: "lora_te1_" if SECOND in lora.changes else "lora_te_", SECOND: "lora_te2_"}.get(network, f"lora_{network}_")
                name = mark + full.replace(".", "_")
                tensors |= {
                    f"{name}.lora_down.weight": delta.down,
                    f"{name}.lora_up.weight": delta.up,
                    f"{name}.alpha": torch.tensor(delta.scale * len(delta.down)),
                }
            elif layout == "peft":
                root = delta.scale**0.5  # peft has one alpha for a whole network: what a layer has of its own goes into its weights
                tensors |= {f"{network}.{full}.lora_A.weight": delta.down * root, f"{network}.{full}.lora_B.weight": delta.up * root}
            else:
                raise ValueError(f"layout (={layout!r}) must be kohya or peft")
    return tensors


def said_of(path: Path, name: str) -> Any:
    """What one of our files says of itself; None of others."""
    said = read_header(path)[1].get(name) if path.suffix == ".safetensors" else None
    try:
        return json.loads(said) if said else None
    except ValueError:
        return None


def style_of_lora(path: Path) -> str | None:
    """The style of our models that one of our files is a change of, as requests say it: "noto:1"."""
    shares = said_of(path, "style")
    if not isinstance(shares, dict) or not all(isinstance(v, int | float) for v in shares.values()):
        return None
    return ",".join(f"{k}:{v:g}" for k, v in shares.items()) or None


def until_of_lora(path: Path) -> float:
    """The time from which on one of our files is at work; 1 of all others."""
    return _number(read_header(path)[1].get("until") if path.suffix == ".safetensors" else None)


def write_lora(lora: Lora, path: Path, *, layout: str = "kohya") -> None:
    """One file; see `lora_tensors`."""
    write_tensors(lora_tensors(lora, layout), path, {"format": "pt"} | {k: v for k, v in lora.about.items() if k.startswith("ss_")})


# --- learned words --------------------------------------------------------------------------------------------------------------------------------

FIRST, SECONDS = "clip_l", "clip_g"  # of files for SDXL


def read_embedding(path: Path) -> dict[str, list[Tensor]]:
    """{name: vectors "n d" for each text encoder} of a textual inversion: diffusers' `{token: vectors}`, A1111's `string_to_param`, or `emb_params`.

    What has no name of its own is called as its file. Raises FileError.
    """
    tensors = read_tensors(path)
    refuse(tensors, path)
    name = _word(path) or path.stem
    if {FIRST, SECONDS} <= tensors.keys():
        return {name: [_vectors(tensors[k], path) for k in (FIRST, SECONDS)]}
    if "emb_params" in tensors:
        return {name: [_vectors(tensors["emb_params"], path)]}
    if set(tensors) == {"*"}:
        return {name: [_vectors(tensors["*"], path)]}
    if len(tensors) > 16 or any(v.ndim not in (1, 2) for v in tensors.values()):
        raise FileError(f"{path} is no textual inversion: it holds {len(tensors)} tensors, {next(iter(tensors))[:60]} among them")
    return {token: [_vectors(v, path)] for token, v in tensors.items()}


def _word(path: Path) -> str | None:
    """The name that one of our files says it is of."""
    word = said_of(path, "word")
    return word if isinstance(word, str) and word.strip() else None


def _vectors(value: Tensor, path: Path) -> Tensor:
    value = value[None] if value.ndim == 1 else value
    if value.ndim != 2 or not value.is_floating_point() or not len(value):
        raise FileError(f"{path} is no textual inversion: its vectors are of the shape {tuple(value.shape)}")
    return value
