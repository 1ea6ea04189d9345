"""A cache of encoded pictures: the codec runs once, the generator trains many times. It carries the codec's hash and refuses another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor
from tqdm import tqdm

from sfumato.core.checkpoint import FileError, load_tensors, read_metadata, save_tensors
from sfumato.core.language import translated


def cached_latents(
    path: Path, encode: Callable[[np.ndarray], Float[Tensor, "b c h w"]], count: int, made_from: dict[str, Any], *, batch: int = 128
) -> Float16[Tensor, "{count} c h w"]:
    """Latents of pictures 0..count-1; read from `path` or encoded and stored there.

    encode: picture indices -> latents. `made_from` says what they depend on ("codec" hash, seed, variety...); a file that was made from
    something else raises ValueError.
    """
    if path.exists():
        stored = read_metadata(path).get("made_from", {})
        if stored != made_from:
            different = [k for k in {**made_from, **dict(stored)} if dict(stored).get(k) != made_from.get(k)]  # type: ignore[call-overload]
            raise ValueError(f"{path} was made from another {', '.join(different)}: remove it, or name another run folder")
        latents = load_tensors(path)[0]["latents"]
        if len(latents) != count:
            raise FileError(f"{path} holds {len(latents)} latents instead of {count}: remove it")
        return latents
    latents = None
    with torch.no_grad(), tqdm(total=count, desc=translated("encoding"), unit=" images", leave=False, mininterval=2) as bar:
        for start in range(0, count, batch):
            indices = np.arange(start, min(start + batch, count))
            part = encode(indices).half().cpu()
            latents = torch.empty(count, *part.shape[1:], dtype=torch.half) if latents is None else latents
            latents[start : start + batch] = part
            bar.update(len(indices))
    assert latents is not None
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("the codec gave latents that are not finite: its weights are broken")
    save_tensors(path, {"latents": latents}, {"made_from": made_from})
    return latents
