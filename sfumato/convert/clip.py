"""CLIP's text encoders in everybody's files: transformers' names, those of its versions up to 4, and OpenCLIP's; and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sfumato.convert.diffusers import filled, read_json, some, tensors_of
from sfumato.core.checkpoint import FileError
from sfumato.text.clip import END, ClipConfig, ClipText, clip_tokenizer, usual_tokenizer
from sfumato.text.prompts import Ear

LAYERS = "encoder.layers."
OPEN = {  # OpenCLIP's names of the parts of a block, and ours
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
WHOLE = {"token_embedding.weight": "embeddings.token_embedding.weight", "positional_embedding": "embeddings.position_embedding.weight",
         "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias"}  # fmt: skip
FUSED = ("q_proj", "k_proj", "v_proj")
HEAD = 64  # numbers a head


def clip_config(c: dict[str, Any], projects: bool, source: object = "text_encoder/config.json") -> ClipConfig:
    """From transformers' config. Raises FileError."""
    try:
        some(num_hidden_layers=c["num_hidden_layers"])
        return ClipConfig(
            vocabulary=c["vocab_size"], width=c["hidden_size"], inner=c["intermediate_size"], depth=c["num_hidden_layers"],
            heads=c["num_attention_heads"], tokens=c.get("max_position_embeddings", 77), activation=c.get("hidden_act", "quick_gelu"),
            projection=c.get("projection_dim", 512) if projects else 0, end=c.get("eos_token_id", 49_407),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(f"{source} does not describe a text encoder of CLIP ({e})") from None


def clip_json(c: ClipConfig) -> dict[str, Any]:
    """The config that transformers makes the same network from."""
    return {
        "architectures": ["CLIPTextModelWithProjection" if c.projection else "CLIPTextModel"], "model_type": "clip_text_model",
        "vocab_size": c.vocabulary, "hidden_size": c.width, "intermediate_size": c.inner, "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads, "max_position_embeddings": c.tokens, "hidden_act": c.activation, "projection_dim": c.projection or c.width,
        "eos_token_id": c.end, "bos_token_id": c.vocabulary - 2, "pad_token_id": 1, "layer_norm_eps": 1e-5,
    }  # fmt: skip


def plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transformers' names, old or new, as ours."""
    named = {k.removeprefix("text_model."): v for k, v in tensors.items()}
    return {k: v for k, v in named.items() if not k.endswith("position_ids")}


def read_clip(folder: Path, variant: str | None = None) -> ClipText:
    """A `text_encoder` folder. Raises FileError."""
    told, tensors = read_json(folder / "config.json"), plain(tensors_of(folder, variant))
    return filled(ClipText, clip_config(told, "text_projection.weight" in tensors, folder), tensors, folder)  # type: ignore[no-any-return]


def read_tokenizer(folder: Path) -> tuple[Tokenizer, int]:
    """A `tokenizer` folder, and the token that fills up. Raises FileError."""
    if not folder.is_dir():
        return usual_tokenizer(), usual_tokenizer().token_to_id(END)
    if (folder / "vocab.json").exists():
        words = read_json(folder / "vocab.json")
        try:
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as e:
            raise FileError(f"{folder / 'merges.txt'} cannot be read ({e})") from None
        pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        if not all(len(p) == 2 for p in pairs):
            raise FileError(f"{folder / 'merges.txt'} must have two parts a line")
        tokenizer = clip_tokenizer(words, pairs)  # type: ignore[arg-type]
    else:
        told = read_json(folder / "tokenizer.json").get("model", {})
        if not {"vocab", "merges"} <= told.keys():
            raise FileError(f"{folder} holds neither vocab.json and merges.txt nor a tokenizer.json of CLIP")
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in told["merges"]]
        tokenizer = clip_tokenizer(told["vocab"], merges)
    told = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            told |= read_json(folder / name)
    pad = told.get("pad_token", END)
    pad = pad.get("content", END) if isinstance(pad, dict) else pad
    number = tokenizer.token_to_id(str(pad))
    return tokenizer, tokenizer.token_to_id(END) if number is None else number


# --- OpenCLIP -------------------------------------------------------------------------------------------------------------------------------------


def from_open(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names as ours: queries, keys and values apart, the projection turned."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in WHOLE:
            found[WHOLE[name]] = value
        elif name == "text_projection":
            found["text_projection.weight"] = value.T.contiguous()
        elif name.startswith("transformer.resblocks."):
            number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
            if rest.startswith("attn.in_proj_"):
                ending = rest.removeprefix("attn.in_proj_")
                found |= {f"{LAYERS}{number}.self_attn.{q}.{ending}": v.clone() for q, v in zip(FUSED, value.chunk(3), strict=True)}
            else:
                part, _, ending = rest.rpartition(".")
                found[f"{LAYERS}{number}.{OPEN.get(part, part)}.{ending}"] = value
        elif name not in ("logit_scale", "attn_mask"):
            found[name] = value
    return found


def to_open(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round."""
    whole, blocks = {v: k for k, v in WHOLE.items()}, {v: k for k, v in OPEN.items()}
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name in whole:
            found[whole[name]] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.T.contiguous()
        else:
            number, _, rest = name.removeprefix(LAYERS).partition(".")
            part, _, ending = rest.rpartition(".")
            if part == "self_attn.q_proj":
                parts = [tensors[f"{LAYERS}{number}.self_attn.{q}.{ending}"] for q in FUSED]
                found[f"transformer.resblocks.{number}.attn.in_proj_{ending}"] = torch.cat(parts)
            elif part in blocks:
                found[f"transformer.resblocks.{number}.{blocks[part]}.{ending}"] = value
    return found


def clip_of(tensors: dict[str, Tensor], opened: bool, source: object) -> ClipText:
    """The text encoder of a single file, from the shapes of its tensors by our names. Raises FileError."""
    try:
        vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
        depth = 1 + max(int(k.split(".")[2]) for k in tensors if k.startswith(LAYERS))
        if depth > len(tensors):
            raise ValueError(f"a block of the number {depth:,}")
        projection = tensors["text_projection.weight"].shape[0] if "text_projection.weight" in tensors else 0
        config = ClipConfig(
            vocabulary=vocabulary, width=width, inner=tensors[f"{LAYERS}0.mlp.fc1.weight"].shape[0], depth=depth, heads=max(width // HEAD, 1),
            tokens=tensors["embeddings.position_embedding.weight"].shape[0], activation="gelu" if opened else "quick_gelu", projection=projection,
            end=vocabulary - 1,
        )  # fmt: skip
    except (KeyError, ValueError, IndexError) as e:
        raise FileError(f"{source}: its text encoder is none of CLIP ({type(e).__name__}: {e})") from None
    return filled(ClipText, config, tensors, source)  # type: ignore[no-any-return]


def of_diffusers(ear: Ear) -> ClipText:
    """The network as diffusers has it where it is the only one: it ends with the block that is heard, and projects nothing."""
    network = ear.network
    config = replace(network.config, depth=network.config.depth - ear.layer + 1, projection=0)
    kept = {k: v for k, v in network.state_dict().items() if k != "text_projection.weight" and _block_of(k) < config.depth}
    return filled(ClipText, config, kept, "the text encoder")  # type: ignore[no-any-return]


def _block_of(name: str) -> int:
    return int(name.split(".")[2]) if name.startswith(LAYERS) else -1


def with_last(ear: Ear) -> dict[str, Tensor]:
    """The tensors of a network of OpenCLIP's that is heard one block before its end; where that block was left out, one that changes nothing."""
    tensors, depth = ear.network.state_dict(), ear.network.config.depth
    if ear.layer == 1:
        tensors |= {
            k.replace(f"{LAYERS}{depth - 1}.", f"{LAYERS}{depth}."): torch.zeros_like(v) for k, v in tensors.items() if _block_of(k) == depth - 1
        }
    return tensors


def ears_of(text: dict[str, Tensor], source: object) -> list[Ear]:
    """The ears of a single file: its tensors under `cond_stage_model.` or `conditioner.embedders.`. Raises FileError."""
    usual = usual_tokenizer()
    end = usual.token_to_id(END)

    def under(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in text.items() if k.startswith(prefix)}

    if first := plain(under("cond_stage_model.transformer.")):
        return [Ear(clip_of(first, False, source), usual, end)]
    if second := from_open(under("cond_stage_model.model.")):
        return [Ear(clip_of(second, True, source), usual, 0, layer=2)]
    one, two = plain(under("conditioner.embedders.0.transformer.")), from_open(under("conditioner.embedders.1.model."))
    if one and two:
        return [Ear(clip_of(one, False, source), usual, end, 2, False), Ear(clip_of(two, True, source), usual, 0, 2, False)]
    raise FileError(f"{source} holds no text encoder that is known: name the whole checkpoint, not the UNet alone")


def text_tensors(ears: list[Ear]) -> dict[str, Tensor]:
    """The ears by the names of single files; what `ears_of` reads."""
    if len(ears) == 2:
        first = {f"conditioner.embedders.0.transformer.text_model.{k}": v for k, v in ears[0].network.state_dict().items()}
        return first | {f"conditioner.embedders.1.model.{k}": v for k, v in to_open(ears[1].network.state_dict()).items()}
    network = ears[0].network
    if network.config.activation == "gelu":
        return {f"cond_stage_model.model.{k}": v for k, v in to_open(with_last(ears[0])).items()}
    return {f"cond_stage_model.transformer.text_model.{k}": v for k, v in network.state_dict().items()}
