"""A pack: one safetensors file that draws. Large matrices may be stored as int8 rows with one fp16 scale each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.core.checkpoint import FileError, hash_tensors, load_tensors, save_tensors

if TYPE_CHECKING:
    from jaxtyping import Float, Float16, Int8
    from torch import Tensor

SCALE = "#scale"
FORMAT = 2  # 1 had a hash of the tensors alone


def quantise(weight: Float[Tensor, " rows *rest"]) -> tuple[Int8[Tensor, " rows *rest"], Float16[Tensor, " rows"]]:
    """Symmetric int8 per row (first axis): weight = int8 * scale, the error about half a step of max |row| / 127 at most."""
    rows = weight.float().flatten(1)
    scale = (rows.abs().amax(1) / 127).clamp_min(1e-7).half()
    q = (rows / scale.float()[:, None]).round().clamp(-127, 127).char()
    return q.reshape(weight.shape), scale


def dequantise(q: Int8[Tensor, " rows *rest"], scale: Float16[Tensor, " rows"]) -> Float[Tensor, " rows *rest"]:
    return q.float() * scale.float().reshape(-1, *[1] * (q.ndim - 1))


def compress(tensors: dict[str, Tensor], *, int8: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Matrices under the prefixes `int8` as int8 rows; everything else that is floating as fp16."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if value.ndim > 1 and name.startswith(int8) and value.numel() >= 4096:
            out[name], out[name + SCALE] = quantise(value)
        else:
            out[name] = value.half() if value.is_floating_point() else value
    return out


def expand(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `compress`: everything floating in fp32."""
    out: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        out[name] = dequantise(value, scale) if scale is not None else value.float() if value.is_floating_point() else value
    return out


def digest_of(tensors: dict[str, Tensor], metadata: dict[str, Any], format: int = FORMAT) -> str:
    """sha256 of everything that decides what a pack draws: its tensors, and what its metadata says of them."""
    found = hash_tensors(tensors)
    if format == 1:
        return found
    said = json.dumps({k: v for k, v in metadata.items() if k not in ("hash", "format")}, sort_keys=True)
    return hashlib.sha256(f"{found}\n{said}".encode()).hexdigest()


def save_pack(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> str:
    """Writes a pack with its hash; returns the hash."""
    digest = digest_of(tensors, metadata)
    save_tensors(path, tensors, metadata | {"hash": digest, "format": FORMAT})
    return digest


def load_pack(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in fp32 and metadata. Raises FileError where the file is no pack, is of a newer format, or its bytes have changed."""
    tensors, metadata = load_tensors(path)
    meta: dict[str, Any] = dict(metadata)
    if "kind" not in meta or "hash" not in meta:
        raise FileError(f"{path} is a safetensors file, but not one of sfumato's: it says nothing of its kind")
    number = meta.get("format")
    if type(number) is not int or number < 1:
        raise FileError(f"{path} has format {number!r}, which is none of sfumato's: another program wrote it, or it is damaged")
    if number > FORMAT:
        raise FileError(f"{path} has format {number}, this sfumato reads up to {FORMAT}: update sfumato")
    if digest_of(tensors, meta, number) != meta["hash"]:
        raise FileError(f"{path} is damaged: its content does not have the hash it was written with; get it again")
    return expand(tensors), meta
