"""Names of single files: what diffusers makes of them, we do; each is used once; configs are told by shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.resnets import ResnetConfig
from sfumato.convert.compvis import AVERAGED, UNET, VAE, from_unet, parted, places, to_unet, unet_config_of, vae_config_of
from sfumato.convert.diffusers import codec_of, unet_json, vae_json, vae_tensors
from sfumato.convert.taming import from_codec
from sfumato.core.checkpoint import FileError
from sfumato.diffusion.unet import UNet, UNetConfig

V1 = UNetConfig()
SMALL = replace(V1, widths=(64, 128, 128, 128), context=768, heads=(8,) * 4)
UNETS = {
    "1": SMALL,
    "inpainting": replace(SMALL, channels=9),
    "2": replace(SMALL, context=1024, linear=True, heads=(1, 2, 2, 2)),
    "xl": replace(
        SMALL, widths=(64, 128, 128), depths=(0, 2, 3), mid_depth=3, heads=(1, 2, 2), context=2048, linear=True, pooled=1280, sizes=6
    ),
}  # fmt: skip
NET = ResnetConfig(width=32, multipliers=(1, 2, 2), attention=(), z_channels=4, double_z=True, resolution=512)
CODEC = AutoencoderConfig(convnet=NET, bottleneck=KLConfig(channels=4))


def numbered(config: UNetConfig) -> dict[str, Tensor]:
    """The UNet's tensors by our names, each of one number, so that none can be taken for another."""
    with torch.device("meta"):
        state = UNet(config).state_dict()
    return {k: torch.full((1,), float(i)).expand(v.shape) for i, (k, v) in enumerate(state.items())}


@pytest.mark.parametrize("kind", UNETS)
def test_unets_of_single_files(kind: str) -> None:
    config = UNETS[kind]
    ours = numbered(config)
    theirs = from_unet(ours, config)
    assert len(theirs) == len(ours)
    assert all(k.startswith(("input_blocks", "middle_block", "output_blocks", "time_embed", "out", "label_emb")) for k in theirs)
    assert unet_config_of(theirs) == config
    back = to_unet(theirs, config)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[k], ours[k]) for k in ours)
    told = {"class_embed_type": None, "num_class_embeds": None, "addition_embed_type": None} | unet_json(config)
    expected = convert_ldm_unet_checkpoint({UNET + k: v for k, v in theirs.items()}, told)
    assert expected.keys() == ours.keys()
    assert all(float(expected[k].flatten()[0]) == float(ours[k].flatten()[0]) for k in ours)


def test_every_part_is_called_once() -> None:
    for config in UNETS.values():
        ours, theirs = zip(*places(config), strict=True)
        assert len(set(ours)) == len(ours)
        assert len(set(theirs)) == len(theirs)


def test_names_of_version_1_are_the_published_ones() -> None:
    names = from_unet(numbered(V1), V1)
    for name in ("output_blocks.11.0.skip_connection.weight", "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight", "input_blocks.3.0.op.weight",
                 "middle_block.1.proj_in.weight", "output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight"):  # fmt: skip
        assert name in names
    assert sum(v.numel() for v in names.values()) == 859_520_964, "the parameters of Stable Diffusion 1.x"


def test_autoencoders_of_single_files() -> None:
    torch.manual_seed(0)
    codec = Autoencoder(CODEC)
    own = {from_codec(k, gumbel=False): v for k, v in codec.state_dict().items() if not k.startswith("latent_")}
    assert vae_config_of(own) == CODEC
    again = codec_of(CODEC, own, {"mean": [0.0] * 4, "std": [2.0] * 4}, "here")
    assert all(torch.equal(v, codec.state_dict()[k]) for k, v in again.state_dict().items() if not k.startswith("latent_"))
    expected = convert_ldm_vae_checkpoint({VAE + k: v for k, v in own.items()}, vae_json(codec))
    found = vae_tensors(codec)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k].reshape(found[k].shape), found[k]) for k in found)


def test_a_file_comes_apart_with_or_without_averages() -> None:
    config = UNETS["1"]
    raw = from_unet(numbered(config), config)
    averages = {AVERAGED + ("diffusion_model." + k).replace(".", ""): v + 0.5 for k, v in raw.items()}
    whole = {UNET + k: v for k, v in raw.items()} | averages | {
        VAE + "encoder.conv_in.weight": torch.zeros(1), "cond_stage_model.transformer.x": torch.zeros(1), "betas": torch.zeros(1),
        "model_ema.decay": torch.zeros(1),
    }  # fmt: skip
    plain, averaged = parted(whole), parted(whole, averaged=True)
    assert {k: len(v) for k, v in plain.items()} == {"unet": len(raw), "vae": 1, "text": 1, "other": 1}
    assert all(torch.equal(plain["unet"][k], v) for k, v in raw.items())
    assert all(torch.equal(averaged["unet"][k], v + 0.5) for k, v in raw.items())
    few = {k: v for k, v in whole.items() if k not in averages}
    assert all(torch.equal(parted(few, averaged=True)["unet"][k], v) for k, v in raw.items())


def test_what_is_no_unet_is_refused() -> None:
    for tensors in ({}, {"input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}, {"input_blocks.x.0.op.weight": torch.zeros(1)}):
        with pytest.raises(FileError, match="are no UNet of Stable Diffusion"):
            unet_config_of(tensors)
    with pytest.raises(FileError, match="are no autoencoder of Stable Diffusion"):
        vae_config_of({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3)})
