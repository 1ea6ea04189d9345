"""What a foreign file is, told from the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sfumato.convert.checkpoint import read_tensors
from sfumato.convert.compvis import AVERAGED, MANY, UNET, VAE, unet_config_of
from sfumato.convert.header import read_header
from sfumato.convert.kohya import DOWN, OTHERS
from sfumato.convert.stable import CONTEXTS, REFUSED, SNR_MARK, V_MARK
from sfumato.convert.taesd import parts_of
from sfumato.core.checkpoint import FileError
from sfumato.diffusion.unet import UNetConfig

SHOWN = ("ss_base_model_version", "ss_sd_model_name", "ss_network_dim", "ss_network_alpha", "ss_output_name")  # of kohya's metadata


def about(path: Path) -> dict[str, Any]:
    """Facts in the order to print them. Raises FileError for what is no file of tensors."""
    names: Mapping[str, Any]
    names, said = read_header(path) if path.suffix == ".safetensors" else (read_tensors(path, shapes=True), {})
    for mark, what in (REFUSED | OTHERS).items():
        if any(name.startswith(mark) if mark in REFUSED else mark in name for name in names):
            return {"what": f"{what} (not read)", "tensors": len(names)}
    if any(name.startswith(UNET) for name in names):
        return _whole(names)
    if rank := [v.shape[0] for name, v in names.items() if name.endswith(DOWN)]:
        facts: dict[str, Any] = {"what": "LoRA", "layers": len(rank), "rank": max(rank)}
        return facts | {k.removeprefix("ss_"): said[k] for k in SHOWN if k in said}
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= {name.removeprefix(VAE) for name in names}:
        quantizer = any(name.removeprefix(VAE).startswith("quantize.") for name in names)
        return {"what": "VQGAN of taming-transformers" if quantizer else "autoencoder of Stable Diffusion", "tensors": len(names)}
    if tiny := parts_of(names):  # type: ignore[arg-type]
        return {"what": f"tiny autoencoder (TAESD): {' and '.join(sorted(tiny))}", "tensors": len(names)}
    flat = [tuple(v.shape) for v in names.values()]
    if len(names) <= 16 and all(len(s) in (1, 2) for s in flat):
        return {"what": "textual inversion", "vectors": [s[0] if len(s) == 2 else 1 for s in flat], "numbers": [s[-1] for s in flat]}
    return {"what": "tensors of no kind that is known", "tensors": len(names), "for example": ", ".join(list(names)[:3])}


def of_unet(config: UNetConfig) -> dict[str, str]:
    """The version, and what for where it is not for drawing alone."""
    version = "XL" if config.pooled else {"1": "1.x", "2": "2.x"}.get(CONTEXTS.get(config.context, ""), "?")
    return {"version": version} | ({"for": "inpainting"} if config.channels == 2 * config.out_channels + 1 else {})


def _whole(names: Mapping[str, Any]) -> dict[str, Any]:
    """Of a single file of Stable Diffusion."""
    unet = {name.removeprefix(UNET): v for name, v in names.items() if name.startswith(UNET)}
    facts: dict[str, Any] = {"what": "checkpoint of Stable Diffusion"}
    try:
        config = unet_config_of(unet)
    except FileError as e:
        return facts | {"of another kind": str(e), "tensors": len(names)}
    facts |= of_unet(config)
    holds = {"UNet": True, "autoencoder": any(n.startswith(VAE) for n in names),
             "text encoder": any(n.startswith(("cond_stage_model.", "conditioner.")) for n in names),
             "averages": sum(n.startswith(AVERAGED) for n in names) > MANY}  # fmt: skip
    facts["holds"] = ", ".join(k for k, so in holds.items() if so)
    if V_MARK in names:
        facts["predicts"] = "v" + (", down to noise alone" if SNR_MARK in names else "")
    kinds = sorted({str(getattr(v, "dtype", "")).removeprefix("torch.") for v in unet.values()})
    return facts | {"numbers": ", ".join(kinds), "parameters of the UNet": f"{sum(_count(v) for v in unet.values()):,}"}


def _count(value: Any) -> int:
    n = 1
    for side in value.shape:
        n *= side
    return n
