"""Tiny random checkpoints that diffusers and transformers wrote themselves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sfumato.text.clip import usual_tokenizer

LEVELS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
SMALL: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32, "sample_size": 32} | LEVELS
UNETS: dict[str, dict[str, Any]] = {
    "1": SMALL | {"attention_head_dim": 8, "cross_attention_dim": 32},
    "2": SMALL | {"attention_head_dim": (2, 4), "use_linear_projection": True, "cross_attention_dim": 48},
    "inpainting": SMALL | {"attention_head_dim": 8, "in_channels": 9, "cross_attention_dim": 32},
    "xl": SMALL | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4), "use_linear_projection": True, "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 24, "cross_attention_dim": 32 + 48,
    },
}  # fmt: skip
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def shaken(network: nn.Module, seed: int) -> nn.Module:
    """Norms and biases that start at one and zero would hide a wrong name."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    return network.eval()


def text_encoder(width: int, activation: str, projection: int = 0) -> nn.Module:
    told = CLIPTextConfig(
        vocab_size=49_408, hidden_size=width, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=77,
        hidden_act=activation, bos_token_id=49_406, eos_token_id=49_407, pad_token_id=1, projection_dim=projection or width,
    )  # fmt: skip
    return shaken((CLIPTextModelWithProjection if projection else CLIPTextModel)(told), 3)


def tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    import json

    told = json.loads(usual_tokenizer().to_str())["model"]
    return CLIPTokenizer(vocab=told["vocab"], merges=[tuple(m) for m in told["merges"]], pad_token=pad, model_max_length=77)


@dataclass
class Reference:
    """A pipeline of diffusers, and the folder that it wrote."""

    pipe: Any
    folder: Path
    kind: str


def made(kind: str) -> Any:
    torch.manual_seed(0)
    unet = shaken(UNet2DConditionModel(**UNETS[kind]), 1)
    vae = shaken(AutoencoderKL(block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                               latent_channels=4, sample_size=64, layers_per_block=1), 2)  # fmt: skip
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    if kind == "xl":
        return StableDiffusionXLPipeline(
            unet=unet, vae=vae, scheduler=scheduler, text_encoder=text_encoder(32, "quick_gelu"), text_encoder_2=text_encoder(48, "gelu", 24),
            tokenizer=tokenizer(), tokenizer_2=tokenizer("!"), add_watermarker=False,
        )  # fmt: skip
    words = (text_encoder(48, "gelu"), tokenizer("!")) if kind == "2" else (text_encoder(32, "quick_gelu"), tokenizer())
    pipeline = StableDiffusionInpaintPipeline if kind == "inpainting" else StableDiffusionPipeline
    return pipeline(
        unet=unet, vae=vae, scheduler=scheduler, text_encoder=words[0], tokenizer=words[1], safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


@pytest.fixture(scope="session", params=UNETS)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    pipe = made(request.param)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp(f"sd-{request.param}")
    pipe.save_pretrained(folder)
    return Reference(pipe, folder, request.param)
