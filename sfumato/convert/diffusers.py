"""Folders of diffusers: the networks of Stable Diffusion from their configs and files, and back into the same layout.

Our UNet has diffusers' names; the autoencoder's are those of its authors, which `sfumato.convert.taming` knows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.resnets import ResnetConfig
from sfumato.convert.checkpoint import check_fit, read_tensors
from sfumato.convert.taming import from_codec, from_diffusers, to_codec, to_diffusers
from sfumato.core.checkpoint import FileError
from sfumato.diffusion.discrete import SchedulerConfig
from sfumato.diffusion.path import PathConfig
from sfumato.diffusion.unet import UNet, UNetConfig
from sfumato.nn.layers import Unfilled

PLAIN: dict[str, tuple[Any, ...]] = {  # of a UNet's config: what may stand there, for what we do not have otherwise
    "center_input_sample": (False,), "flip_sin_to_cos": (True,), "freq_shift": (0,), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,), "downsample_padding": (1,), "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"),
    "norm_eps": (1e-5,), "reverse_transformer_layers_per_block": (None,), "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,),
    "dual_cross_attention": (False,), "class_embed_type": (None,), "num_class_embeds": (None,), "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default",), "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",), "time_embedding_dim": (None,), "time_embedding_act_fn": (None,), "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (None, False), "cross_attention_norm": (None,),
}  # fmt: skip
KINDS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # of levels on the way down: whether they have transformers
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
MOST = 128  # blocks of a kind, or levels
SCALE = 0.18215  # diffusers' own where a config does not say it


# --- files ----------------------------------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileError with one clear line."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"there is no file {path}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(f"{path} cannot be read as JSON ({e})") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def files_of(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that hold a component's tensors: in safetensors or else .bin, whole or in parts, of the variant ("fp16") where it is asked for or
    there is nothing else. Raises FileError where there are none, or a part is missing.
    """
    for told in [variant] if variant else [None, "fp16"]:
        for ending in ("safetensors", "bin"):
            for stem in STEMS:
                middle = f".{told}" if told else ""
                whole, index = folder / f"{stem}{middle}.{ending}", folder / f"{stem}.{ending}.index{middle}.json"
                if whole.exists():
                    return [whole]
                if index.exists():
                    return _parts(index)
    raise FileError(f"{folder} has no diffusion_pytorch_model.safetensors nor model.safetensors{f' of the variant {variant}' if variant else ''}")


def _parts(index: Path) -> list[Path]:
    told = read_json(index).get("weight_map")
    names = sorted(set(told.values())) if isinstance(told, dict) and all(isinstance(v, str) for v in told.values()) else []
    if not names:
        raise FileError(f"{index} names no files: its weight_map must say where each tensor is")
    for name in names:
        if Path(name).name != name:
            raise FileError(f"{index} names a file outside of its folder ({name!r})")
        if not (index.parent / name).is_file():
            raise FileError(f"{index} names {name}, which is not there: get it again")
    return [index.parent / name for name in names]


def tensors_of(folder: Path, variant: str | None = None) -> dict[str, Tensor]:
    """All tensors of a component."""
    found: dict[str, Tensor] = {}
    for file in files_of(folder, variant):
        part = read_tensors(file)
        if twice := found.keys() & part.keys():
            raise FileError(f"{file} holds {min(twice)}, which another part of {folder} holds, too")
        found |= part
    return found


def some(**counts: Any) -> None:
    """Raises ValueError for more of a thing than any network has: nobody is to wait for a billion layers."""
    for name, value in counts.items():
        if any(not isinstance(v, int) or v > MOST for v in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"{name} (={str(value)[:40]}) must be whole numbers up to {MOST}")


def filled(make: Any, config: Any, tensors: dict[str, Tensor], source: object) -> Any:
    """A network that has these tensors as they are, frozen; no memory is taken for others. Raises FileError where they do not fit."""
    with torch.device("meta"), Unfilled():
        network: nn.Module = make(config)
    check_fit(network.state_dict(), tensors, source)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)


# --- when it is asked -----------------------------------------------------------------------------------------------------------------------------

USUAL = "DPMSolverMultistepScheduler"  # in the place of those that are not here
SCHEDULERS = {
    "PNDMScheduler": "plms", "DDIMScheduler": "ddim", "DDPMScheduler": "ancestral", "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "ancestral", "HeunDiscreteScheduler": "heun", "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp_2m", "DPMSolverSDEScheduler": "dpmpp_sde", "UniPCMultistepScheduler": "unipc", "LCMScheduler": "lcm",
}  # fmt: skip
LINSPACE = ("euler", "heun", "lms", "ancestral", "dpmpp_2m", "dpmpp_sde", "unipc")  # which are spaced so where a config does not say how
PREDICTIONS: dict[str, Any] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def scheduler_config(c: dict[str, Any], source: object = "scheduler_config.json") -> SchedulerConfig:
    """What a `scheduler_config.json` decides; what it says and is not obeyed, `left_out` names. Raises FileError for models of other paths."""
    made = str(c.get("_class_name"))
    for name in ("trained_betas", "use_flow_sigmas"):
        if c.get(name):
            raise FileError(f"{source}: {name} (={str(c[name])[:40]}) is of another kind of model, which is not read")
    made = made if made in SCHEDULERS else USUAL
    asked, sde = SCHEDULERS[made], c.get("algorithm_type") == "sde-dpmsolver++"
    if made == "DPMSolverMultistepScheduler" and sde:
        asked = "dpmpp_3m_sde" if c.get("solver_order", 2) == 3 else "dpmpp_2m_sde"
    over = "karras" if c.get("use_karras_sigmas") else "lambda" if c.get("use_exponential_sigmas") else None
    spacing = c.get("timestep_spacing", "linspace" if asked in LINSPACE and made != "DDPMScheduler" else "leading")
    first = not c.get("set_alpha_to_one", made != "PNDMScheduler")
    try:
        path = PathConfig(
            kind="vp-linear", num_betas=c.get("num_train_timesteps", 1000), beta_start=c.get("beta_start", 0.0001), beta_end=c.get("beta_end", 0.02),
            betas=c.get("beta_schedule", "linear"), zero_snr=bool(c.get("rescale_betas_zero_snr", False)),
        )  # fmt: skip
        return SchedulerConfig(
            path=path, prediction=PREDICTIONS[c.get("prediction_type", "epsilon")], sampler=asked, schedule=over or spacing, spacing=spacing,
            offset=c.get("steps_offset", 0), ends="first" if first else "clean", rounded=True,
            least=c.get("final_sigmas_type") == "sigma_min",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{source} does not say when a model is asked ({e})") from None


def left_out(c: dict[str, Any]) -> list[str]:
    """Settings of a `scheduler_config.json` by which pictures differ, and which are not obeyed: "name (=value)"."""
    made = str(c.get("_class_name"))
    plain = {"use_beta_sigmas": False, "use_lu_lambdas": False, "thresholding": False, "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
             "solver_type": ("midpoint", "bh2"), "predict_x0": True, "disable_corrector": [], "timestep_type": "discrete",
             "interpolation_type": "linear", "lower_order_final": True}  # fmt: skip
    orders = {"DPMSolverMultistepScheduler": (3,) if c.get("algorithm_type") == "sde-dpmsolver++" else (), "LMSDiscreteScheduler": (4,)}
    if c.get("solver_order", 2) not in (2, *orders.get(made, ())):
        plain["solver_order"] = 2
    odd = {k: c[k] for k, usual in plain.items() if k in c and c[k] not in (usual if isinstance(usual, tuple) else (usual,))}
    if made not in SCHEDULERS:
        odd["_class_name"] = made
    return [f"{k} (={str(v)[:40]})" for k, v in odd.items()]


def scheduler_json(c: SchedulerConfig) -> dict[str, Any]:
    """The config that diffusers makes the same scheduler from."""
    asked = {v: k for k, v in SCHEDULERS.items() if k != "DDPMScheduler"} | {
        "dpmpp_2m_sde": "DPMSolverMultistepScheduler", "dpmpp_3m_sde": "DPMSolverMultistepScheduler",
    }  # fmt: skip
    more: dict[str, Any] = {"dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"}, "plms": {"skip_prk_steps": True},
                            "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}}.get(c.sampler, {})  # fmt: skip
    if c.least:
        more |= {"final_sigmas_type": "sigma_min"}
    if c.sampler in ("ddim", "plms"):
        more |= {"set_alpha_to_one": c.ends == "clean"} | ({"clip_sample": False} if c.sampler == "ddim" else {})
    if c.schedule in ("karras", "edm"):
        more |= {"use_karras_sigmas": True}
    elif c.schedule == "lambda":
        more |= {"use_exponential_sigmas": True}
    p = c.path
    return {
        "_class_name": asked[c.sampler], "num_train_timesteps": p.num_betas, "beta_start": p.beta_start, "beta_end": p.beta_end,
        "beta_schedule": p.betas, "prediction_type": {v: k for k, v in PREDICTIONS.items()}[c.prediction], "timestep_spacing": c.spacing,
        "steps_offset": c.offset, "rescale_betas_zero_snr": p.zero_snr,
    } | more  # fmt: skip


# --- the UNet -------------------------------------------------------------------------------------------------------------------------------------


def unet_config(config: dict[str, Any], source: object = "unet/config.json") -> UNetConfig:
    """Raises FileError for what our network does not have, by its name."""
    for name, allowed in PLAIN.items():
        value = config.get(name, allowed[0])
        if value not in allowed and not (isinstance(value, list) and set(value) <= set(allowed)):
            raise FileError(f"{source}: {name} (={value!r}) must be {' or '.join(map(repr, allowed))}: another kind of network, which is not read")
    try:
        return _unet_config(config)
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{source} does not describe a UNet of Stable Diffusion ({e})") from None


def _unet_config(c: dict[str, Any]) -> UNetConfig:
    widths = tuple(c["block_out_channels"])
    n = len(widths)
    some(levels=n, **{k: c.get(k, 1) for k in ("layers_per_block", "transformer_layers_per_block")})
    attends = [KINDS[kind] for kind in c["down_block_types"]]
    layers, heads = (_each(c.get(k, d), n) for k, d in (("transformer_layers_per_block", 1), ("attention_head_dim", 8)))
    if c.get("num_attention_heads") is not None:
        heads = _each(c["num_attention_heads"], n)
    blocks = set(_each(c.get("layers_per_block", 2), n))
    context = set(_each(c.get("cross_attention_dim", 1280), n))
    if len(blocks) > 1 or len(context) > 1:
        raise ValueError("layers_per_block and cross_attention_dim must be the same in all levels")
    told = c.get("addition_embed_type") == "text_time"
    size_width = int(c.get("addition_time_embed_dim") or 256)
    return UNetConfig(
        channels=c.get("in_channels", 4), out_channels=c.get("out_channels", 4), widths=widths, blocks=blocks.pop(),
        depths=tuple(d if a else 0 for d, a in zip(layers, attends, strict=True)), mid_depth=layers[-1], heads=tuple(heads), context=context.pop(),
        linear=bool(c.get("use_linear_projection", False)), pooled=c["projection_class_embeddings_input_dim"] - 6 * size_width if told else 0,
        sizes=6 if told else 0, size_width=size_width, groups=c.get("norm_num_groups", 32),
    )  # fmt: skip


def _each(value: Any, n: int) -> list[int]:
    return list(value) if isinstance(value, list | tuple) else [value] * n


def unet_json(c: UNetConfig) -> dict[str, Any]:
    """The config that diffusers makes the same network from."""
    down = ["CrossAttnDownBlock2D" if d else "DownBlock2D" for d in c.depths]
    layers = [d or 1 for d in c.depths[:-1]] + [c.mid_depth]
    if c.depths[-1] not in (0, c.mid_depth) or not c.mid_depth:
        raise ValueError(
            f"depths (={c.depths}) with mid_depth (={c.mid_depth}) cannot be said in that layout: the middle is as deep as the last level"
        )
    told = {
        "addition_embed_type": "text_time", "addition_time_embed_dim": c.size_width,
        "projection_class_embeddings_input_dim": c.pooled + c.sizes * c.size_width,
    } if c.pooled else {}  # fmt: skip
    return {
        "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": list(c.heads), "block_out_channels": list(c.widths),
        "cross_attention_dim": c.context, "down_block_types": down,
        "up_block_types": ["CrossAttnUpBlock2D" if d else "UpBlock2D" for d in reversed(c.depths)], "in_channels": c.channels,
        "out_channels": c.out_channels, "layers_per_block": c.blocks, "norm_num_groups": c.groups, "transformer_layers_per_block": layers,
        "use_linear_projection": c.linear,
    } | told  # fmt: skip


def read_unet(folder: Path, variant: str | None = None) -> UNet:
    """A `unet` folder. Raises FileError."""
    return filled(UNet, unet_config(read_json(folder / "config.json"), folder), tensors_of(folder, variant), folder)


# --- the autoencoder ------------------------------------------------------------------------------------------------------------------------------


def vae_config(c: dict[str, Any], source: object = "vae/config.json") -> tuple[AutoencoderConfig, dict[str, Any]]:
    """The codec, and its statistics: {mean, std} by channel, in the units of the encoder. Raises FileError for what our codec does not have."""
    plain = {"norm_num_groups": 32, "use_quant_conv": True, "use_post_quant_conv": True, "mid_block_add_attention": True}
    for name, value in plain.items():
        if c.get(name, value) != value:
            raise FileError(f"{source}: {name} (={c[name]!r}) must be {value!r}: another kind of autoencoder, which is not read")
    try:
        widths, latent = c["block_out_channels"], c.get("latent_channels", 4)
        some(levels=len(widths), layers_per_block=c.get("layers_per_block", 1))
        attention = {k for k in (*c.get("down_block_types", ()), *c.get("up_block_types", ())) if k not in ("DownEncoderBlock2D", "UpDecoderBlock2D")}
        if attention:
            raise ValueError(f"blocks (={sorted(attention)}) must be DownEncoderBlock2D and UpDecoderBlock2D")
        net = ResnetConfig(
            image_channels=c.get("in_channels", 3), width=widths[0], multipliers=tuple(w // widths[0] for w in widths), attention=(),
            blocks=c.get("layers_per_block", 1), z_channels=latent, double_z=True, resolution=512,
        )  # fmt: skip
        mean, std = (c.get(k) for k in ("latents_mean", "latents_std"))
        scale = float(c.get("scaling_factor", SCALE))
        shift = float(c.get("shift_factor") or 0.0)
        return AutoencoderConfig(convnet=net, bottleneck=KLConfig(channels=latent)), {
            "mean": [shift] * latent if mean is None else mean, "std": [1 / scale] * latent if std is None else [s / scale for s in std]
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
        raise FileError(f"{source} does not describe the autoencoder of Stable Diffusion ({e})") from None


def read_vae(folder: Path, variant: str | None = None) -> Autoencoder:
    """A `vae` folder. Raises FileError."""
    told = read_json(folder / "config.json")
    config, latents = vae_config(told, folder)
    theirs = from_diffusers(tensors_of(folder, variant), len(told["block_out_channels"]), told.get("layers_per_block", 1))
    return codec_of(config, theirs, latents, folder)


def codec_of(config: AutoencoderConfig, tensors: dict[str, Tensor], latents: dict[str, Any], source: object) -> Autoencoder:
    """The codec of tensors in the layout of its authors."""
    own = {f"latent_{k}": torch.tensor(v, dtype=torch.float32) for k, v in latents.items()}
    return filled(Autoencoder, config, {to_codec(k): v for k, v in tensors.items()} | own, source)


def vae_json(codec: Autoencoder) -> dict[str, Any]:
    """The config that diffusers makes the same autoencoder from."""
    net, latent = codec.config.convnet, codec.config.bottleneck.channels
    if not isinstance(net, ResnetConfig) or not isinstance(codec.config.bottleneck, KLConfig) or any(map(net.attends, range(len(net.multipliers)))):
        raise ValueError("a codec goes into that layout with resnet networks, a kl bottleneck, and attention in the middle only")
    std = codec.latent_std
    one = bool((std == std[0]).all() and (codec.latent_mean == 0).all())
    several = {"scaling_factor": 1.0, "latents_mean": codec.latent_mean.tolist(), "latents_std": std.tolist()}
    told = {"scaling_factor": float(f"{1 / std[0]:.6g}")} if one else several
    n = len(net.multipliers)
    return {
        "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [net.width * m for m in net.multipliers],
        "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n, "in_channels": net.image_channels,
        "out_channels": net.image_channels, "latent_channels": latent, "layers_per_block": net.blocks, "norm_num_groups": 32,
        "sample_size": net.resolution,
    } | told  # fmt: skip


def vae_tensors(codec: Autoencoder) -> dict[str, Tensor]:
    """The codec's tensors by diffusers' names."""
    theirs = {from_codec(k, gumbel=False): v for k, v in codec.state_dict().items() if not k.startswith("latent_")}
    return to_diffusers(theirs, len(codec.config.convnet.multipliers))  # type: ignore[union-attr]
