"""VQGAN checkpoints of taming-transformers, and of diffusers' `VQModel`: into a codec of ours, and back into the same layout.

Each name is used once in each direction; what is left over is an error, except the loss's networks, which no picture needs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.gumbel import GumbelConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.resnets import ResnetConfig
from sfumato.convert.checkpoint import check_fit, read_tensors
from sfumato.core.checkpoint import FileError
from sfumato.core.config import from_json, to_json
from sfumato.priors.mingpt import MinGPT, MinGPTConfig
from sfumato.priors.tokens import Vocabulary

RESOLUTION = 256  # of which attention's resolutions are said where no YAML tells another
LEFT_OUT = ("loss.", "colorize", "model_ema.")


class SecondStageError(FileError):
    """The transformer of a whole model cannot be read; its codec can."""


FIRST_STAGE, SECOND_STAGE = "first_stage_model.", "transformer."
OWN = ("counts", "unused", "updates")  # of our bottleneck: what it counts while it learns


NAMES = (  # beginnings of names: theirs, ours
    ("quantize.embedding.weight", "bottleneck.codebook"),
    ("quantize.embedding.cluster_size", "bottleneck.cluster_size"),
    ("quantize.embedding.embed_avg", "bottleneck.sums"),
    ("quantize.embed.weight", "bottleneck.codebook"),  # of Gumbel
    ("quantize.proj.", "bottleneck.proj."),
    ("quant_conv.", "encoder.quant_conv."),
    ("post_quant_conv.", "decoder.post_quant_conv."),
)


def to_codec(name: str) -> str:
    """A name of taming-transformers -> ours, without the `codec.` of a pack."""
    return next((ours + name[len(theirs) :] for theirs, ours in NAMES if name.startswith(theirs)), name)


def from_codec(name: str, gumbel: bool) -> str:
    """The other way round."""
    table = reversed(NAMES) if gumbel else NAMES  # a Gumbel codebook is the later of the two
    return next((theirs + name[len(ours) :] for theirs, ours in table if name.startswith(ours)), name)


# --- what a checkpoint is -------------------------------------------------------------------------------------------------------------------------


def config_of(tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> AutoencoderConfig:
    """The network from the shapes of its tensors; `settings` (`model.params` of a YAML) add what shapes do not say: resolution, dropout, beta."""
    shape = {k: tuple(v.shape) for k, v in tensors.items()}
    for needed in ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"):
        if needed not in shape:
            raise FileError(f"the checkpoint has no tensor {needed}: it is no VQGAN of taming-transformers")
    params = settings or {}
    net = params.get("ddconfig", {})
    width, levels = shape["encoder.conv_in.weight"][0], _count(shape, r"encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
    multipliers = tuple(shape[f"encoder.down.{i}.block.0.conv1.weight"][0] // width for i in range(levels))
    resolution = int(net.get("resolution", RESOLUTION))
    attention = tuple(resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shape)
    convnet = ResnetConfig(
        image_channels=shape["encoder.conv_in.weight"][1], width=width, multipliers=multipliers, attention=attention, resolution=resolution,
        blocks=_count(shape, r"encoder\.down\.0\.block\.(\d+)\.conv1\.weight"), z_channels=shape["decoder.conv_in.weight"][1],
        double_z=shape["encoder.conv_out.weight"][0] == 2 * shape["decoder.conv_in.weight"][1], dropout=float(net.get("dropout", 0.0)),
    )  # fmt: skip
    return AutoencoderConfig(convnet=convnet, bottleneck=_bottleneck(shape, params))


def _bottleneck(shape: dict[str, tuple[int, ...]], params: dict[str, Any]) -> VQConfig | GumbelConfig:
    if "quantize.embed.weight" in shape:
        size, channels = shape["quantize.embed.weight"]
        return GumbelConfig(size=size, channels=channels, encoder_channels=shape["quantize.proj.weight"][1])
    if "quantize.embedding.weight" not in shape:
        raise FileError("the checkpoint has no codebook (quantize.embedding.weight or quantize.embed.weight): it is no VQGAN")
    size, channels = shape["quantize.embedding.weight"]
    ema = "quantize.embedding.embed_avg" in shape
    return VQConfig(
        size=size, channels=channels, cosine=False, gradient="straight-through", learn="ema" if ema else "gradient",
        commitment=float(params.get("beta", 0.25)), restart=0.0, legacy_beta=not ema,
    )  # fmt: skip


def _count(names: dict[str, Any], pattern: str) -> int:
    found = {int(m[1]) for n in names if (m := re.fullmatch(pattern, n))}
    if found != set(range(len(found))) or not found:
        raise FileError(f"the checkpoint has {sorted(found)} of {pattern}: it is no VQGAN of taming-transformers")
    return len(found)


def settings_beside(path: Path) -> dict[str, Any] | None:
    """`model.params` of the one YAML file that lies beside a checkpoint, or in the `configs` folder of its run; None without one."""
    try:
        import yaml
    except ImportError:
        return None
    for folder in (path.parent, path.parent.parent / "configs"):
        files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
        projects = [f for f in files if "project" in f.name] or files
        if len(projects) == 1:
            try:
                found = yaml.safe_load(projects[0].read_text(encoding="utf-8"))
                return found["model"]["params"]
            except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
                raise FileError(f"{projects[0]} beside {path.name} is no config of a VQGAN: move it away to read the checkpoint without it") from None
    return None


# --- reading and writing ----------------------------------------------------------------------------------------------------------------------------


def read_vqgan(path: Path) -> Autoencoder:
    """The codec of a taming-transformers checkpoint (`.ckpt`, `.pt`, `.safetensors`), alone or of a whole model, or of a diffusers `VQModel` folder,
    in evaluation mode. Raises FileError where tensors are missing or left over.
    """
    return _first_stage(Path(path))[0]


def read_model(path: Path) -> tuple[Autoencoder, MinGPT | None]:
    """The same, and of a whole model (`Net2NetTransformer`) the transformer over its codes. Raises SecondStageError where that is of another kind."""
    codec, tensors, yaml = _first_stage(Path(path))
    whole = any(k.startswith(SECOND_STAGE + "tok_emb") for k in tensors)
    return codec, _transformer_of(tensors, yaml, codec, Path(path)) if whole else None


def _first_stage(path: Path) -> tuple[Autoencoder, dict[str, Tensor], dict[str, Any]]:
    """The codec, all tensors, and what the YAML says."""
    if path.is_dir():
        return _codec_of(*_from_diffusers(path), path), {}, {}
    tensors, settings = read_tensors(path), settings_beside(path)
    if not any(k.startswith(FIRST_STAGE) for k in tensors):
        return _codec_of(tensors, settings, path), tensors, settings or {}
    first = ((settings or {}).get("first_stage_config") or {}).get("params") or settings
    own = {k.removeprefix(FIRST_STAGE): v for k, v in tensors.items() if k.startswith(FIRST_STAGE)}
    return _codec_of(own, first, path), tensors, settings or {}


def _codec_of(tensors: dict[str, Tensor], settings: dict[str, Any] | None, path: Path) -> Autoencoder:
    tensors = {k: v for k, v in tensors.items() if not k.startswith(LEFT_OUT)}
    codec = Autoencoder(config_of(tensors, settings))
    ours = {to_codec(k): v.float() for k, v in tensors.items()}
    codec.latent_std.fill_(1 / (settings or {}).get("scaling_factor", 1.0))
    own = {k: v for k, v in codec.state_dict().items() if k.startswith("latent_") or k.rpartition(".")[2] in OWN}
    check_fit(codec.state_dict(), ours | own, path)
    codec.load_state_dict(ours | own)
    return codec.eval().requires_grad_(False)


def to_taming(codec: Autoencoder) -> dict[str, Tensor]:
    """The tensors of a codec in the layout of taming-transformers. Raises ValueError for one that this layout cannot hold."""
    config = codec.config
    gumbel = isinstance(config.bottleneck, GumbelConfig)
    plain = isinstance(config.bottleneck, VQConfig) and not config.bottleneck.cosine
    net = config.convnet
    if not isinstance(net, ResnetConfig) or not (plain or gumbel):
        raise ValueError(
            f"a codec of {net.kind} networks with a {config.bottleneck.kind} bottleneck has no place in that layout: "
            "it holds resnet networks with vq (cosine false) or gumbel"
        )
    if (net.norm, net.activation) != ("group", "silu"):
        raise ValueError(f"norm (={net.norm!r}) and activation (={net.activation!r}) must be group and silu: that layout has no others")
    kept = {k: v for k, v in codec.state_dict().items() if not k.startswith("latent_") and k.rpartition(".")[2] not in OWN}
    return {from_codec(k, gumbel): v.detach().clone().contiguous() for k, v in kept.items()}


def write_vqgan(codec: Autoencoder, path: Path) -> None:
    """Writes the layout of taming-transformers: `.safetensors`, else a PyTorch checkpoint of plain tensors; a path without an ending is a folder
    in the layout of diffusers' `VQModel`.
    """
    tensors = to_taming(codec)
    if not path.suffix:
        return _to_diffusers(codec, tensors, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors}, path)


# --- the second stage ---------------------------------------------------------------------------------------------------------------------------


def _transformer_of(tensors: dict[str, Tensor], yaml: dict[str, Any], codec: Autoencoder, path: Path) -> MinGPT:
    """Raises SecondStageError where it is of another kind: told pictures, with codes in another order, or with positions that see what comes."""
    if any(k.startswith("cond_stage_model.") for k in tensors):
        raise SecondStageError(f"{path} draws after pictures (depth, segmentation, another codec), which cannot be read: classes or nothing can")
    if "Identity" not in (yaml.get("permuter_config") or {}).get("target", "Identity"):
        raise SecondStageError(f"{path} writes its codes in another order than row by row, which cannot be read")
    own = {k.removeprefix(SECOND_STAGE): v.float() for k, v in tensors.items() if k.startswith(SECOND_STAGE)}
    masks = [v for k, v in own.items() if k.endswith("attn.mask")]
    if any(not torch.equal(m[0, 0], torch.ones_like(m[0, 0]).tril()) for m in masks):
        raise SecondStageError(f"{path} has a transformer whose first tokens see each other, which cannot be read")
    kept = {k: v for k, v in own.items() if not k.endswith("attn.mask")}
    if "n_head" not in ((yaml.get("transformer_config") or {}).get("params") or {}):
        raise SecondStageError(
            f"{path} holds a transformer whose heads only its YAML tells: put that beside it (transformer_config.params.n_head; needs pyyaml)"
        )
    labels = _classes_of(yaml, path)
    network = MinGPT(_transformer_config(kept, codec, yaml, labels))
    try:
        network.load_state_dict(kept)
    except RuntimeError as e:
        raise SecondStageError(f"{path}: its transformer does not fit: {' '.join(str(e).split())[:200]}") from None
    return network.eval().requires_grad_(False)


def _classes_of(yaml: dict[str, Any], path: Path) -> int:
    """How many classes a transformer is told of; 0 where it is told nothing. Raises SecondStageError where it is told something else."""
    told = yaml.get("cond_stage_config")
    if yaml.get("unconditional") or told == "__is_unconditional__":
        return 0
    classes = (told.get("params") or {}).get("n_classes") if isinstance(told, dict) else None
    if not isinstance(classes, int) or classes < 1:
        raise SecondStageError(f"{path} is told neither classes nor nothing (cond_stage_config of its YAML), which cannot be read")
    return classes


def _transformer_config(tensors: dict[str, Tensor], codec: Autoencoder, yaml: dict[str, Any], labels: int) -> MinGPTConfig:
    shape = {k: tuple(v.shape) for k, v in tensors.items()}
    tokens, width = shape["tok_emb.weight"]
    block, net = shape["pos_emb"][1], codec.config.convnet
    heads = int(yaml["transformer_config"]["params"]["n_head"])
    side = min(net.resolution // net.factor, math.isqrt(block))  # type: ignore[union-attr]
    vocabulary = Vocabulary(codes=codec.spec.codebook_size, grid=(side, side))
    depth = _count(shape, r"blocks\.(\d+)\.ln1\.weight")
    start = int(yaml.get("sos_token", 0))
    return MinGPTConfig(vocabulary=vocabulary, tokens=tokens, block=block, width=width, depth=depth, heads=heads, labels=labels, start=start)


def whole_pack(codec: Autoencoder, network: MinGPT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a pack that draws; classes are called by their numbers."""
    tensors, meta = to_pack(codec)
    side = network.config.vocabulary.grid[0] * codec.config.convnet.factor
    labels = [str(i) for i in range(network.config.labels)]
    said = {"styles": [], "labels": labels, "words": {}, "filler": [], "credits": []}
    meta |= {"kind": "codes", "prior": to_json(network.config), "size": side} | said
    return tensors | {f"prior.{k}": v for k, v in network.state_dict().items()}, meta


# --- diffusers ------------------------------------------------------------------------------------------------------------------------------------

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def diffusers_name(name: str, levels: int) -> str:
    """A name of taming-transformers -> that of diffusers."""
    rules = (
        (r"encoder\.down\.(\d+)\.block\.", lambda m: f"encoder.down_blocks.{m[1]}.resnets."),
        (r"encoder\.down\.(\d+)\.attn\.", lambda m: f"encoder.down_blocks.{m[1]}.attentions."),
        (r"encoder\.down\.(\d+)\.downsample\.", lambda m: f"encoder.down_blocks.{m[1]}.downsamplers.0."),
        (r"decoder\.up\.(\d+)\.block\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.resnets."),
        (r"decoder\.up\.(\d+)\.attn\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.attentions."),
        (r"decoder\.up\.(\d+)\.upsample\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.upsamplers.0."),
        (r"(encoder|decoder)\.mid\.block_(\d)\.", lambda m: f"{m[1]}.mid_block.resnets.{int(m[2]) - 1}."),
        (r"(encoder|decoder)\.mid\.attn_1\.", lambda m: f"{m[1]}.mid_block.attentions.0."),
        (r"(encoder|decoder)\.norm_out\.", lambda m: f"{m[1]}.conv_norm_out."),
    )
    for pattern, replaced in rules:
        name = re.sub("^" + pattern, replaced, name)  # type: ignore[arg-type]
    name = name.replace("nin_shortcut", "conv_shortcut")
    if "attentions." in name:
        head, part, kind = name.rsplit(".", 2)
        name = f"{head}.{ATTENTION[part]}.{kind}"
    return name


def from_diffusers(tensors: dict[str, Tensor], levels: int, blocks: int) -> dict[str, Tensor]:
    """An autoencoder of diffusers in the layout of taming-transformers; names that it does not know are left as they are."""
    names = {diffusers_name(n, levels): n for n in _taming_names(levels, blocks)}
    found = {}
    for key, value in tensors.items():
        key = re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{OLD[m[1]]}.", key)
        ours = names.get(key, key)
        found[ours] = value[:, :, None, None] if re.search(r"attn.*\.(q|k|v|proj_out)\.weight$", ours) and value.ndim == 2 else value
    return found


def to_diffusers(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The other way round."""
    theirs = {diffusers_name(k, levels): v for k, v in tensors.items()}
    return {k: v[:, :, 0, 0].contiguous() if "attentions." in k and k.endswith("weight") and v.ndim == 4 else v for k, v in theirs.items()}


def _from_diffusers(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        levels = len(config["block_out_channels"])
    except (OSError, ValueError, KeyError, TypeError):
        raise FileError(f"{folder} is no folder of a diffusers VQModel: it has no config.json with block_out_channels") from None
    if config.get("norm_type", "group") != "group" or config.get("norm_num_groups", 32) != 32 or not config.get("mid_block_add_attention", True):
        raise FileError(f"{folder}: VQModels with spatial norms, other than 32 groups or no attention in the middle cannot be read")
    files = [p for n in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin") if (p := folder / n).exists()]
    if not files:
        raise FileError(f"{folder} has no diffusion_pytorch_model.safetensors")
    found = from_diffusers(read_tensors(files[0]), levels, config.get("layers_per_block", 1))
    side = config.get("sample_size")
    scale = config.get("scaling_factor", SCALE)
    if not isinstance(scale, int | float) or not scale > 0:
        raise FileError(f"{folder}: scaling_factor (={scale!r}) in config.json must be a number above 0")
    resolution = side if isinstance(side, int) and side % 2 ** (levels - 1) == 0 else RESOLUTION
    return found, {"ddconfig": {"resolution": resolution}, "scaling_factor": scale}


SCALE = 0.18215  # diffusers' own where a config does not say it
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _taming_names(levels: int, blocks: int) -> Iterator[str]:
    """Every name that a network of that shape could have."""
    parts = [f"{n}.{k}" for n in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut") for k in ("weight", "bias")]
    attention = [f"{n}.{k}" for n in ATTENTION for k in ("weight", "bias")]
    for side, way, more, last in (("encoder", "down", 0, "downsample"), ("decoder", "up", 1, "upsample")):
        for i in range(levels):
            for j in range(blocks + more):
                yield from (f"{side}.{way}.{i}.block.{j}.{p}" for p in parts)
                yield from (f"{side}.{way}.{i}.attn.{j}.{p}" for p in attention)
            yield from (f"{side}.{way}.{i}.{last}.conv.{k}" for k in ("weight", "bias"))
        yield from (f"{side}.mid.block_{b}.{p}" for b in (1, 2) for p in parts)
        yield from (f"{side}.mid.attn_1.{p}" for p in attention)
        yield from (f"{side}.norm_out.{k}" for k in ("weight", "bias"))


def _to_diffusers(codec: Autoencoder, tensors: dict[str, Tensor], folder: Path) -> None:
    net, b = codec.config.convnet, codec.config.bottleneck
    assert isinstance(net, ResnetConfig)
    if not isinstance(b, VQConfig) or b.learn == "ema":
        raise ValueError(f"a {b.kind} bottleneck{' that is an average' if isinstance(b, VQConfig) else ''} has no place in a diffusers VQModel")
    names = [net.attends(i) for i in range(len(net.multipliers))]
    config = {
        "_class_name": "VQModel", "in_channels": net.image_channels, "out_channels": net.image_channels, "act_fn": "silu",
        "block_out_channels": [net.width * m for m in net.multipliers], "layers_per_block": net.blocks, "latent_channels": net.z_channels,
        "num_vq_embeddings": b.size, "vq_embed_dim": b.channels, "norm_num_groups": 32, "sample_size": net.resolution,
        "scaling_factor": float(f"{1 / codec.latent_std[codec.latent_std > 0].mean():.6g}"),
        "down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in names],
        "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(names)],
    }  # fmt: skip
    flat = to_diffusers(tensors, len(net.multipliers))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(flat, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


# --- packs ----------------------------------------------------------------------------------------------------------------------------------------


def to_pack(codec: Autoencoder, size: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) of a pack that holds the codec alone; `size` is the side of the pictures that models on it draw, where it is another.
    Raises ValueError for a size that the codec does not have.
    """
    net = codec.config.convnet
    size = size or (net.resolution if isinstance(net, ResnetConfig) else 8 * net.factor)
    if size < 1 or size % net.factor:
        raise ValueError(f"size (={size}) must be a multiple of {net.factor}, by which this codec makes pictures smaller")
    tensors = {f"codec.{k}": v.clone() for k, v in codec.state_dict().items()}
    return tensors, {"kind": "codec", "codec": to_json(codec.config), "size": size}


def from_pack(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Autoencoder:
    """The codec of a pack."""
    codec = Autoencoder(from_json(AutoencoderConfig, metadata["codec"]))
    codec.load_state_dict({k.removeprefix("codec."): v for k, v in tensors.items() if k.startswith("codec.")})
    return codec.eval().requires_grad_(False)
