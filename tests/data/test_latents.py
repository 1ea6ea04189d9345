from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.core.checkpoint import FileError
from sfumato.data.latents import cached_latents


def encode(indices: np.ndarray) -> Tensor:
    return torch.from_numpy(indices).float()[:, None, None, None].expand(-1, 2, 2, 2)


def refuse(indices: np.ndarray) -> Tensor:
    raise AssertionError("the cache was not used")


def test_encoded_once(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    first = cached_latents(path, encode, 10, {"codec": "a"}, batch=3)
    assert first.dtype == torch.float16
    assert first[:, 0, 0, 0].tolist() == list(range(10))
    assert torch.equal(cached_latents(path, refuse, 10, {"codec": "a"}), first)


def test_another_codec_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    cached_latents(path, encode, 4, {"codec": "a", "seed": 0})
    with pytest.raises(ValueError, match="another codec:"):
        cached_latents(path, encode, 4, {"codec": "b", "seed": 0})
    with pytest.raises(ValueError, match="4 latents instead of 5"):
        cached_latents(path, encode, 5, {"codec": "a", "seed": 0})


def test_latents_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    with pytest.raises(ValueError, match="not finite"):
        cached_latents(path, lambda i: encode(i) / 0, 4, {})
    assert not path.exists()


def test_a_cache_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    cached_latents(path, encode, 10, {"codec": "a"})
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileError, match="is not readable"):
        cached_latents(path, refuse, 10, {"codec": "a"})


def test_a_cache_that_was_not_ended_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "latents.npy"
    cached_latents(path, encode, 10, {"codec": "a"})
    path.with_suffix(".json").unlink()
    assert cached_latents(path, encode, 4, {"codec": "b"}).shape == (4, 2, 2, 2)
