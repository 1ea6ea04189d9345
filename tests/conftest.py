"""Two threads, reproducible examples, and a cache folder of the session's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("sfumato", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("sfumato")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is written to the user's cache, unless the caller names one."""
    os.environ.setdefault("SFUMATO_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def exact_arithmetic() -> Iterator[None]:
    """A trainer flushes subnormal numbers to zero, for the whole process; hypothesis refuses to draw floats then."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs codec, text and diffusion of the smoke presets: a real model, trained for seconds."""
    from sfumato.train import autoencoder, diffusion, text

    folder = tmp_path_factory.mktemp("smoke")
    autoencoder.train(*autoencoder.preset_smoke(), folder / "codec")
    text.train(*text.preset_smoke(), folder / "text")
    diffusion.train(*diffusion.preset_smoke(), folder / "diffusion", codec=folder / "codec", text=folder / "text")
    return folder
