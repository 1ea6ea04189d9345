"""The one place that knows every network: {kind: (Config, Network)}, and how a network is written into and read out of a file of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.upscaler import Upscaler, UpscalerConfig
from sfumato.core.checkpoint import FileError
from sfumato.core.config import from_json
from sfumato.diffusion.dit import DiT, DiTConfig
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.gans.pair import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from sfumato.metrics.judge import JudgeConfig, JudgeNet
from sfumato.priors.frequency import Frequency, FrequencyConfig
from sfumato.priors.mingpt import MinGPT, MinGPTConfig
from sfumato.priors.transformer import Prior, PriorConfig
from sfumato.text.encoder import TextConfig, TextEncoder

NETWORKS: dict[str, tuple[type, type[nn.Module]]] = {
    "autoencoder": (AutoencoderConfig, Autoencoder),
    "dit": (DiTConfig, DiT),
    "unet": (UNetConfig, UNet),
    "prior": (PriorConfig, Prior),
    "mingpt": (MinGPTConfig, MinGPT),
    "frequency": (FrequencyConfig, Frequency),
    "generator": (GeneratorConfig, Generator),
    "discriminator": (DiscriminatorConfig, Discriminator),
    "text": (TextConfig, TextEncoder),
    "upscaler": (UpscalerConfig, Upscaler),
    "judge": (JudgeConfig, JudgeNet),
}


def make(config: dict[str, Any], *extra: Any) -> nn.Module:
    """The network that a JSON config with its `kind` describes; `extra` goes to its constructor (the tokenizer of a text encoder)."""
    kind = config.get("kind")
    if kind not in NETWORKS:
        raise FileError(f"network kind (={kind!r}) must be one of {', '.join(NETWORKS)}: was the file made by a newer sfumato?")
    config_type, network = NETWORKS[kind]
    return network(from_json(config_type, config, kind), *extra)


def load_into(network: nn.Module, tensors: dict[str, Tensor], prefix: str) -> nn.Module:
    """Strictly loads the tensors under `prefix`, frozen and in evaluation mode. Raises FileError where a tensor is missing, foreign or not finite."""
    own = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    for name, value in own.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise FileError(
                f"tensor {prefix}{name} holds values that are not finite: the file is broken, get it again or train on from an older checkpoint"
            )
    try:
        network.load_state_dict(own, strict=True)
    except RuntimeError as e:
        raise FileError(f"the tensors under '{prefix}' do not fit their config: {' '.join(str(e).split())[:300]}") from None
    return network.eval().requires_grad_(False)
