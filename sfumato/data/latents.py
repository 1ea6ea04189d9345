"""A cache of encoded pictures (latents, codes): the codec runs once, the generator trains many times. It carries the codec's hash, refuses another.

It is an .npy file that is written and read through a map of it, so that memory does not grow with the set; a .json beside it says what it is of.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, new_array, replacing, write_json
from sfumato.core.language import translated


def cached_latents(
    path: Path, encode: Callable[[np.ndarray], Shaped[Tensor, " b *of"]], count: int, made_from: dict[str, Any], *, batch: int = 128
) -> Shaped[Tensor, " {count} *of"]:
    """Latents (kept as fp16) or codes (as int32) of pictures 0..count-1; read from `path` (.npy) or encoded and stored there.

    encode: picture indices -> latents or codes. `made_from` says what they depend on ("codec" hash, seed, variety...); a file that was made from
    something else raises ValueError.
    """
    told = path.with_suffix(".json")
    if path.exists() and told.exists():
        stored = json.loads(told.read_text(encoding="utf-8"))
        if stored != made_from:
            different = [k for k in {**made_from, **stored} if stored.get(k) != made_from.get(k)]
            raise ValueError(f"{path} was made from another {', '.join(different)}: remove it, or name another run folder")
        latents = _mapped(path)
        if len(latents) != count:
            raise FileError(f"{path} holds {len(latents)} latents instead of {count}: remove it")
        return latents
    first = _encoded(encode, np.arange(min(batch, count)))
    with replacing(path) as temporary, tqdm(total=count, desc=translated("encoding"), unit=" images", leave=False, mininterval=2) as bar:
        held = new_array(temporary, first.dtype, (count, *first.shape[1:]))
        for start in range(0, count, batch):
            part = _encoded(encode, np.arange(start, min(start + batch, count))) if start else first
            held[start : start + len(part)] = part
            bar.update(len(part))
        held.flush()
    write_json(told, made_from)
    return _mapped(path)


@torch.no_grad()
def _encoded(encode: Callable[[np.ndarray], Tensor], indices: np.ndarray) -> np.ndarray:
    found = encode(indices).cpu()
    if not found.is_floating_point():
        return found.int().numpy()
    if not bool(torch.isfinite(found.half()).all()):
        raise ValueError("the codec gave latents that are not finite: its weights are broken")
    return found.half().numpy()


def _mapped(path: Path) -> Tensor:
    try:
        held = np.load(path, mmap_mode="r")
    except (ValueError, OSError) as e:
        raise FileError(f"{path} is not readable ({e}): remove it, and it is made again") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch minds that the file is not to be written to; nobody does
        return torch.from_numpy(held)
