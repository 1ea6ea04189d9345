"""Single files of Stable Diffusion (CompVis, Stability AI): the names of their tensors, and what network they are of.

Each name is used once in each direction. `model.diffusion_model.` is the UNet, `first_stage_model.` the autoencoder, `cond_stage_model.` (SDXL:
`conditioner.embedders.`) the text encoder; `model_ema.` averaged weights of the UNet.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sfumato.codecs.autoencoder import AutoencoderConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.resnets import ResnetConfig
from sfumato.core.checkpoint import FileError
from sfumato.diffusion.unet import UNetConfig

UNET, VAE, AVERAGED = "model.diffusion_model.", "first_stage_model.", "model_ema."
MANY = 100  # averaged tensors, from which on they are the averages of a UNet and not a stray counter
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}  # fmt: skip
HEAD = 64  # numbers a head, in all that came after version 1
HEADS = 8  # in version 1


def places(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(ours, theirs): beginnings of names, of every part of a UNet."""
    c, each = config, config.blocks + 1
    yield from (("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"))
    for ours, theirs in (("time_embedding", "time_embed"), *((("add_embedding", "label_emb.0"),) if c.pooled else ())):
        yield from ((f"{ours}.linear_{i}", f"{theirs}.{2 * i - 2}") for i in (1, 2))
    levels = len(c.widths)
    for i, depth in enumerate(c.depths):
        for j in range(c.blocks):
            yield from _block(f"down_blocks.{i}", j, f"input_blocks.{1 + i * each + j}", bool(depth))
        if i < levels - 1:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{(i + 1) * each}.0.op"
    yield from _block("mid_block", 0, "middle_block", bool(c.mid_depth))
    yield from _resnet("mid_block.resnets.1", f"middle_block.{2 if c.mid_depth else 1}")
    for i, depth in enumerate(reversed(c.depths)):
        for j in range(each):
            yield from _block(f"up_blocks.{i}", j, f"output_blocks.{i * each + j}", bool(depth))
        if i < levels - 1:
            yield f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{i * each + c.blocks}.{2 if depth else 1}.conv"


def _block(ours: str, j: int, theirs: str, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{ours}.resnets.{j}", f"{theirs}.0")
    if attends:
        yield f"{ours}.attentions.{j}", f"{theirs}.1"


def _resnet(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RESNET.items())


def to_unet(tensors: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """A UNet's tensors by our names; what no part is called stays as it is."""
    return _renamed(tensors, [(theirs, ours) for ours, theirs in places(config)])


def from_unet(tensors: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The other way round."""
    return _renamed(tensors, list(places(config)))


def _renamed(tensors: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Names by the longest beginning that is in the table and ends before a dot."""
    known, found = dict(table), {}
    for name, value in tensors.items():
        parts = name.split(".")
        cut = next((n for n in range(len(parts) - 1, 0, -1) if ".".join(parts[:n]) in known), 0)
        found[".".join([known[".".join(parts[:cut])], *parts[cut:]]) if cut else name] = value
    return found


def unet_config_of(tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> UNetConfig:
    """The network from the shapes of its tensors, named as in a single file but without `model.diffusion_model.`. How many heads there are no shape
    tells: version 1 (768 numbers a token) has 8, all others 64 numbers a head, where `settings` (`unet_config.params` of a YAML) say nothing else.

    Raises FileError where it is no UNet of Stable Diffusion.
    """
    shape = {k: tuple(v.shape) for k, v in tensors.items()}
    try:
        return _unet_config_of(shape, settings or {})
    except (KeyError, IndexError, StopIteration, ZeroDivisionError, ValueError) as e:
        raise FileError(f"its tensors under {UNET} are no UNet of Stable Diffusion ({type(e).__name__}: {e})") from None


def _unet_config_of(shape: dict[str, tuple[int, ...]], settings: dict[str, Any]) -> UNetConfig:
    downs = sorted(int(k.split(".")[1]) for k in shape if k.startswith("input_blocks.") and k.endswith(".0.op.weight"))
    blocks = downs[0] - 1
    if max(downs) > len(shape):
        raise ValueError(f"a block of the number {max(downs):,}")
    last = max(int(k.split(".")[1]) for k in shape if k.startswith("input_blocks."))
    levels = [[i * (blocks + 1) + 1 + j for j in range(blocks)] for i in range(len(downs) + 1)]
    if levels[-1][-1] != last or downs != [(i + 1) * (blocks + 1) for i in range(len(downs))]:
        raise ValueError(f"{last} blocks on the way down with halvings at {downs}")
    widths = tuple(shape[f"input_blocks.{level[0]}.0.out_layers.3.weight"][0] for level in levels)
    depth = lambda place: len({k.split(".transformer_blocks.")[1].split(".")[0] for k in shape if k.startswith(f"{place}.transformer_blocks.")})  # noqa: E731
    depths = tuple(depth(f"input_blocks.{level[0]}.1") for level in levels)
    context = next(s[1] for k, s in shape.items() if k.endswith("attn2.to_k.weight"))
    linear = next(len(s) == 2 for k, s in shape.items() if k.endswith("proj_in.weight"))
    channels, told = settings.get("num_head_channels", -1), settings.get("num_heads", -1)
    if channels <= 0 and told <= 0:
        channels, told = (-1, HEADS) if context == 768 else (HEAD, -1)
    heads = tuple(told if told > 0 else max(w // channels, 1) for w in widths)
    sizes, size_width = (6, 256) if "label_emb.0.0.weight" in shape else (0, 256)
    pooled = shape["label_emb.0.0.weight"][1] - sizes * size_width if sizes else 0
    return UNetConfig(
        channels=shape["input_blocks.0.0.weight"][1], out_channels=shape["out.2.weight"][0], widths=widths, blocks=blocks, depths=depths,
        mid_depth=depth("middle_block.1"), heads=heads, context=context, linear=linear, pooled=pooled, sizes=sizes, size_width=size_width,
    )  # fmt: skip


def vae_config_of(tensors: dict[str, Tensor]) -> AutoencoderConfig:
    """The codec from the shapes of its tensors, named as in a single file but without `first_stage_model.`. Raises FileError where it is none."""
    shape = {k: tuple(v.shape) for k, v in tensors.items()}
    try:
        width, image_channels = shape["encoder.conv_in.weight"][:2]
        numbers = lambda at, start: 1 + max(int(k.split(".")[at]) for k in shape if k.startswith(start))  # noqa: E731
        levels, blocks, latent = numbers(2, "encoder.down."), numbers(4, "encoder.down.0.block."), shape["post_quant_conv.weight"][1]
        if max(levels, blocks) > len(shape):
            raise ValueError(f"a block of the number {max(levels, blocks):,}")
        widths = [shape[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        net = ResnetConfig(
            image_channels=image_channels, width=width, multipliers=tuple(w // width for w in widths), attention=(), blocks=blocks,
            z_channels=shape["decoder.conv_in.weight"][1], double_z=True, resolution=512,
        )  # fmt: skip
        return AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=latent))
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as e:
        raise FileError(f"its tensors under {VAE} are no autoencoder of Stable Diffusion ({type(e).__name__}: {e})") from None


def parted(tensors: dict[str, Tensor], averaged: bool = False) -> dict[str, dict[str, Tensor]]:
    """What a single file holds: {"unet", "vae", "text", "other": tensors without their beginnings}; `averaged` takes the averages of the UNet
    where the file has them.
    """
    found: dict[str, dict[str, Tensor]] = {"unet": {}, "vae": {}, "text": {}, "other": {}}
    averages = {k for k in tensors if k.startswith(AVERAGED)}
    for name, value in tensors.items():
        if name.startswith(UNET):
            short = AVERAGED + name.removeprefix("model.").replace(".", "")
            taken = tensors[short] if averaged and len(averages) > MANY and short in averages else value
            found["unet"][name.removeprefix(UNET)] = taken
        elif name.startswith(VAE):
            found["vae"][name.removeprefix(VAE)] = value
        elif name.startswith(("cond_stage_model.", "conditioner.embedders.")):
            found["text"][name] = value
        elif name not in averages:
            found["other"][name] = value
    return found
