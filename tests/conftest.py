"""Two threads, reproducible examples, and a cache folder of the session's own."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
