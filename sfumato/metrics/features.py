"""Features of pictures, by which they are compared. A network says its name and the hash of its weights; how pictures are resized for it is said too.

EfficientNet-Lite0 is the default and works offline. Inception (only from the file `pt_inception-2015-12-05` that users bring) is what a Frechet
Inception Distance and an Inception Score mean; nothing else is called so. CLIP and DINOv2 come through `transformers`, where it and they are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, hash_tensors
from sfumato.core.language import translated
from sfumato.nn.backbones import efficientnet_lite0, lite0_on, over, resize

SIDE = 128  # pixels at which Lite0 looks, whatever a picture has
BATCH = 64
STYLE_SIDE = 224  # pixels at which it looks at how a picture is drawn
INCEPTION_SHA256 = "6726825d"  # with which the file's hash begins, as its name says
CLIP_MODEL, DINO_MODEL = "openai/clip-vit-large-patch14-336", "facebook/dinov2-large"
Resize = Literal["antialias", "bicubic", "legacy-bilinear", "legacy-tf", "nearest"]
RESIZES: tuple[Resize, ...] = ("antialias", "bicubic", "legacy-bilinear", "legacy-tf", "nearest")
NETWORKS = ("lite0", "inception", "clip", "dinov2")


@dataclass(frozen=True)
class FeatureNet:
    """A network that looks at RGB "b 3 side side" in [0, 1]: `features` gives "b d", and logits where they mean something (Inception)."""

    name: str
    digest: str
    side: int
    dimensions: int
    features: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    device: str = "cpu"
    verified: bool = True
    texts: Callable[[list[str]], Tensor] | None = None  # of CLIP: features of words, "n d", in the same space


def resized(x: Float[Tensor, "b c h w"], side: int, how: Resize = "antialias") -> Float[Tensor, "b c {side} {side}"]:
    """Pictures in [0, 1] as squares of `side` pixels.

    antialias: bilinear with antialiasing where they become smaller; bicubic: the same with cubes, clipped to [0, 1] (the policy of clean-fid);
    legacy-bilinear: without antialiasing (PyTorch's default, and torchvision's before 0.17); legacy-tf: as TensorFlow 1 did it for the original
    FID, corners of pixels on corners; nearest. The first is right, the others are for comparing with figures that were made with them.
    """
    if x.shape[-2:] == (side, side):
        return x
    match how:
        case "antialias":
            return F.interpolate(x, size=(side, side), mode="bilinear", antialias=side < max(x.shape[-2:]), align_corners=False)
        case "bicubic":
            return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        case "legacy-bilinear":
            return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
        case "legacy-tf":
            return _tensorflow_1(x, side)
        case "nearest":
            return F.interpolate(x, size=(side, side), mode="nearest")
    raise ValueError(f"resize (={how!r}) must be one of {', '.join(RESIZES)}")


def _tensorflow_1(x: Tensor, side: int) -> Tensor:
    """Bilinear at output i from input i * scale, not (i + 1/2) * scale - 1/2: shifted by up to half a pixel, without antialiasing."""
    for dim in (-2, -1):
        at = torch.arange(side, device=x.device, dtype=torch.float64) * (x.shape[dim] / side)
        low = at.floor().long()
        high = (low + 1).clamp_max(x.shape[dim] - 1)
        share = (at - low).to(x.dtype)
        share = share[:, None] if dim == -2 else share
        x = torch.lerp(x.index_select(dim, low), x.index_select(dim, high), share)
    return x


# --- networks -----------------------------------------------------------------------------------------------------------------------------------


@cache
def feature_net(name: str = "lite0", path: str | None = None, device: str = "cpu") -> FeatureNet:
    """A network by its name: lite0, inception (`path`: the file), clip, dinov2 (`path`: a folder or the name of a model). Raises ValueError."""
    match name:
        case "lite0":
            network = efficientnet_lite0()
            moved = network if device == "cpu" else lite0_on(torch.device(device))
            return FeatureNet(
                "EfficientNet-Lite0", hash_tensors(network.state_dict())[:16], SIDE, 1280, lambda x: (moved.pooled(x * 2 - 1), None), device
            )
        case "inception":
            return _inception(path, device)
        case "clip":
            return _of_transformers(name, path or CLIP_MODEL, device)
        case "dinov2":
            return _of_transformers(name, path or DINO_MODEL, device)
    raise ValueError(f"features (={name!r}) must be one of {', '.join(NETWORKS)}")


def _inception(path: str | None, device: str) -> FeatureNet:
    from sfumato.nn.inception import DIMENSIONS, InceptionV3

    if path is None:
        raise ValueError("features (='inception') need --features-path: the file pt_inception-2015-12-05-6726825d.pth of the project pytorch-fid")
    if not Path(path).is_file():
        raise FileError(f"there is no file {path}")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if not digest.startswith(INCEPTION_SHA256):
        raise FileError(f"{path} is not the original Inception file: its sha256 begins with {digest[:8]}, not {INCEPTION_SHA256}; get it again")
    network = InceptionV3()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.eval().requires_grad_(False).to(device)
    return FeatureNet("Inception v3 (2015-12-05)", digest[:16], 299, DIMENSIONS, lambda x: network(x * 2 - 1), device, verified=False)


def _of_transformers(kind: str, model: str, device: str) -> FeatureNet:
    """CLIP's picture embedding or DINOv2's class token, of pictures normalised as their own processors do; how they are resized is `Resize`."""
    try:
        from transformers import AutoImageProcessor, AutoModel
    except ImportError:
        raise ValueError(f"features (={kind!r}) need the package transformers: pip install -e '.[sd]'") from None
    try:
        processor, network = AutoImageProcessor.from_pretrained(model, use_fast=False), AutoModel.from_pretrained(model)
    except (OSError, ValueError) as e:
        raise FileError(f"{model} cannot be loaded for features (={kind!r}): {str(e).splitlines()[0]}") from None
    network.eval().requires_grad_(False).to(device)
    size = getattr(processor, "crop_size", None) or processor.size
    side = int(size.get("height") or size.get("shortest_edge"))
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (processor.image_mean, processor.image_std))

    def features(x: Tensor) -> tuple[Tensor, None]:
        x = (x - mean) / std
        return (_tensor(network.get_image_features(x)) if kind == "clip" else network(x).last_hidden_state[:, 0]), None

    with torch.no_grad():
        dimensions = features(torch.zeros(1, 3, side, side, device=device))[0].shape[1]
    digest = hash_tensors(network.state_dict())[:16]
    return FeatureNet(
        f"{kind}: {model}", digest, side, dimensions, features, device, texts=_words_of_clip(model, network, device) if kind == "clip" else None
    )


def _words_of_clip(model: str, network: nn.Module, device: str) -> Callable[[list[str]], Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    @torch.no_grad()
    def texts(words: list[str]) -> Tensor:
        tokens = tokenizer(words, padding=True, truncation=True, max_length=network.config.text_config.max_position_embeddings, return_tensors="pt")
        return _tensor(network.get_text_features(**tokens.to(device))).float().cpu()

    return texts


def _tensor(found: Any) -> Tensor:
    """Of what `transformers` gives: since version 5 an output with the projected features as its pooled ones."""
    return found if isinstance(found, Tensor) else found.pooler_output


# --- looking ------------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def look(net: FeatureNet, rgb: Float[Tensor, "b 3 h w"], how: Resize = "antialias") -> tuple[Tensor, Tensor | None]:
    """(features "b d", logits or None) of pictures in [0, 1], in fp32 on the CPU, BATCH at a time."""
    found = [net.features(resized(part.to(net.device), net.side, how)) for part in rgb.split(BATCH)]
    logits = [b.cpu() for _, b in found if b is not None]
    return torch.cat([a.float().cpu() for a, _ in found]), torch.cat(logits) if logits else None


def picture_features(pixels: UInt8[Tensor, "n 4 s s"]) -> Float[Tensor, "n 1280"]:
    """Lite0 features of premultiplied RGBA over white; smaller and larger pictures are resized bilinearly to SIDE pixels."""
    net = feature_net()
    parts = tqdm(pixels.split(BATCH), desc=translated("features of the pictures"), leave=False)
    return torch.cat([look(net, over(part.float() / 255))[0] for part in parts])


@torch.no_grad()
def style_statistics(rgb: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
    """How pictures in [0, 1] are drawn rather than what they show: means and deviations of Lite0's early maps (the statistics of arXiv 1703.06868).
    Raises ValueError where the network's package is not installed.
    """
    net, found = efficientnet_lite0(), []
    for part in rgb.split(BATCH):
        maps = net.maps(resize(part.cpu().clamp(0, 1), STYLE_SIDE) * 2 - 1, 10)
        found.append(torch.cat([torch.cat([m.mean((2, 3)), m.std((2, 3))], 1) for m in maps], 1))
    return torch.cat(found)
