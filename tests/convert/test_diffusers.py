"""Networks of Stable Diffusion that diffusers wrote: the same numbers, and back again bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato.convert.diffusers import files_of, read_unet, read_vae, tensors_of, unet_config, unet_json, vae_json, vae_tensors
from sfumato.core.checkpoint import FileError
from sfumato.core.seams import Cond
from sfumato.diffusion.unet import TIMES, UNet

LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SMALL = {"block_out_channels": (32, 64), "layers_per_block": 2, "norm_num_groups": 16, "cross_attention_dim": 24, "sample_size": 16} | LEVELS
UNETS: dict[str, dict[str, Any]] = {
    "1": SMALL | {"attention_head_dim": 8},
    "2": SMALL | {"attention_head_dim": (2, 4), "use_linear_projection": True, "layers_per_block": 1},
    "inpainting": SMALL | {"attention_head_dim": 4, "in_channels": 9, "layers_per_block": 1},
    "xl": SMALL | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 3), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20,
    },
}  # fmt: skip
VAES: dict[str, dict[str, Any]] = {
    "usual": {},
    "deep": {"layers_per_block": 2, "scaling_factor": 0.13025, "block_out_channels": (32, 32, 64)},
}


def shaken(network: nn.Module) -> nn.Module:
    """Norms and biases that start at one and zero would hide a wrong name."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.eval()


@pytest.fixture(scope="module", params=UNETS)
def unet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[UNet2DConditionModel, Path]:
    torch.manual_seed(0)
    theirs = shaken(UNet2DConditionModel(**UNETS[request.param]))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return theirs, folder  # type: ignore[return-value]


@pytest.fixture(scope="module", params=VAES)
def vae(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKL, Path]:
    torch.manual_seed(0)
    settings = {"block_out_channels": (32, 64)} | VAES[request.param]
    n = len(settings["block_out_channels"])
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    theirs = shaken(AutoencoderKL(**kinds, **settings))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)  # type: ignore[operator]
    return theirs, folder  # type: ignore[return-value]


def near(ours: Tensor, theirs: Tensor, relative: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= relative * float(theirs.abs().max())


# --- the UNet -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", [(16, 16), (10, 6), (7, 9)])
def test_unets_say_what_diffusers_says(unet: tuple[UNet2DConditionModel, Path], sides: tuple[int, int]) -> None:
    theirs, folder = unet
    ours, xl = read_unet(folder), theirs.config.addition_embed_type is not None
    channels = theirs.config.in_channels
    x, text, pooled, sizes = torch.randn(2, channels, *sides), torch.randn(2, 5, 24), torch.randn(2, 20), torch.rand(2, 6) * 1024
    steps = torch.tensor([3, 870])
    beside = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}} if xl else {}
    told = Cond(text=text, pooled=pooled, extra={TIMES: sizes}) if xl else Cond(text=text, concat=x[:, 4:] if channels > 4 else None)
    with torch.no_grad():
        near(ours(x[:, :4], (steps + 1) / 1000, told), theirs(x, steps, text, **beside).sample)


def test_residuals_of_a_controlnet_are_added_as_diffusers_adds_them(unet: tuple[UNet2DConditionModel, Path]) -> None:
    theirs, folder = unet
    ours = read_unet(folder)
    n, xl = ours.config.blocks, theirs.config.addition_embed_type is not None
    x, text, step = torch.randn(1, theirs.config.in_channels, 8, 8), torch.randn(1, 5, 24), torch.tensor([500])
    pooled, sizes = torch.randn(1, 20), torch.rand(1, 6)
    beside_time = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}} if xl else {}
    told = Cond(text=text, pooled=pooled, extra={TIMES: sizes}) if xl else Cond(text=text)
    shapes = [(32, 8)] * (n + 1) + [(32, 4)] + [(64, 4)] * n
    beside = [torch.randn(1, c, s, s) for c, s in shapes]
    middle = torch.randn(1, 64, 4, 4)
    with torch.no_grad():
        added = {"down_block_additional_residuals": beside, "mid_block_additional_residual": middle}
        found = ours(x, (step + 1) / 1000, told, [*beside, middle])
        near(found, theirs(x, step, text, **added, **beside_time).sample)
        assert not torch.allclose(found, ours(x, (step + 1) / 1000, told))


def test_a_mask_leaves_tokens_out(unet: tuple[UNet2DConditionModel, Path]) -> None:
    ours = read_unet(unet[1])
    c = ours.config
    x, text, t = torch.randn(2, c.channels, 8, 8), torch.randn(2, 5, 24), torch.tensor([0.2, 0.8])
    more = {"pooled": torch.randn(2, c.pooled), "extra": {TIMES: torch.rand(2, 6)}} if c.pooled else {}
    mask = torch.tensor([[True, True, True, False, False]]).expand(2, 5)
    with torch.no_grad():
        near(ours(x, t, Cond(text=text, mask=mask, **more)), ours(x, t, Cond(text=text[:, :3], **more)))  # type: ignore[arg-type]


def test_unets_go_back_bit_for_bit(unet: tuple[UNet2DConditionModel, Path]) -> None:
    theirs, folder = unet
    ours = read_unet(folder)
    again = UNet2DConditionModel.from_config(unet_json(ours.config))
    again.load_state_dict(ours.state_dict())
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())
    assert unet_config(unet_json(ours.config)) == ours.config


def test_what_a_unet_wants_is_said(unet: tuple[UNet2DConditionModel, Path]) -> None:
    ours = read_unet(unet[1])
    c = ours.config
    x, t = torch.randn(1, c.channels, 8, 8), torch.tensor([0.5])
    with pytest.raises(ValueError, match="cond must have text"):
        ours(x, t, Cond())
    with pytest.raises(ValueError, match=rf"x must have {c.channels} channels"):
        ours(torch.randn(1, 5, 8, 8), t, Cond(text=torch.randn(1, 5, 24)))
    more = {"pooled": torch.randn(1, c.pooled), "extra": {TIMES: torch.rand(1, 6)}} if c.pooled else {}
    with pytest.raises(ValueError, match="must have 24 numbers a token, not 32"):
        ours(x, t, Cond(text=torch.randn(1, 5, 32), **more))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_embed_type": "timestep"}, r"class_embed_type \(='timestep'\) must be None"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "does not describe a UNet of Stable Diffusion"),
        ({"block_out_channels": [30, 64]}, "must be multiples of groups"),
        ({"block_out_channels": None}, "does not describe a UNet"),
    ],
)
def test_other_unets_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(FileError, match=said):
        unet_config({k: list(v) if isinstance(v, tuple) else v for k, v in UNETS["1"].items()} | change)


# --- the autoencoder ------------------------------------------------------------------------------------------------------------------------------


def test_autoencoders_say_what_diffusers_says(vae: tuple[AutoencoderKL, Path]) -> None:
    theirs, folder = vae
    ours = read_vae(folder)
    x = torch.rand(2, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(x).latent_dist
        found = ours.encode(x)
        assert found.mean is not None
        assert found.std is not None
        near(found.mean, posterior.mean * theirs.config.scaling_factor)
        near(found.std, posterior.std * theirs.config.scaling_factor)
        z = torch.randn_like(posterior.mean)
        near(ours.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample)


def test_autoencoders_go_back_bit_for_bit(vae: tuple[AutoencoderKL, Path]) -> None:
    theirs, folder = vae
    ours = read_vae(folder)
    again = AutoencoderKL.from_config(vae_json(ours))
    again.load_state_dict(vae_tensors(ours))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in again.state_dict().items())
    assert again.config.scaling_factor == pytest.approx(theirs.config.scaling_factor)


def test_names_of_older_files_are_known(vae: tuple[AutoencoderKL, Path], tmp_path: Path) -> None:
    theirs, folder = vae
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, before in old.items():
        tensors = {k.replace(f".{new}.", f".{before}."): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    z = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        near(read_vae(tmp_path).decode(z), theirs.decode(z / theirs.config.scaling_factor).sample)


# --- files ----------------------------------------------------------------------------------------------------------------------------------------


def test_files_in_parts_and_variants(unet: tuple[UNet2DConditionModel, Path], tmp_path: Path) -> None:
    theirs, whole = unet
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert len(files_of(tmp_path / "parts")) > 1
    for name in ("parts", "half", "bin"):
        found = tensors_of(tmp_path / name)
        assert all(torch.equal(v, found[k]) for k, v in tensors_of(whole).items())
    with pytest.raises(FileError, match="of the variant fp16"):
        tensors_of(whole, "fp16")
    index = tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json"
    told = json.loads(index.read_text())
    part = next(iter(told["weight_map"].values()))
    for value, said in (("../other.safetensors", "names a file outside of its folder"), ("gone.safetensors", "which is not there")):
        index.write_text(json.dumps({"weight_map": told["weight_map"] | {"conv_in.weight": value}}))
        with pytest.raises(FileError, match=said):
            tensors_of(tmp_path / "parts")
    index.write_text("[]")
    with pytest.raises(FileError, match="must hold a JSON object"):
        tensors_of(tmp_path / "parts")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": part}}))
    (tmp_path / "parts" / "config.json").write_text((whole / "config.json").read_text())
    with pytest.raises(FileError, match=r"does not fit: it lacks \d+ tensors"):
        read_unet(tmp_path / "parts")


def test_a_network_of_a_file_takes_no_second_copy(unet: tuple[UNet2DConditionModel, Path]) -> None:
    tensors = tensors_of(unet[1])
    from sfumato.convert.diffusers import filled

    network = filled(UNet, unet_config(json.loads((unet[1] / "config.json").read_text())), tensors, "here")
    assert all(p.data_ptr() == tensors[k].data_ptr() for k, p in network.named_parameters())
