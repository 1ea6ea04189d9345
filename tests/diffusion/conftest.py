"""A Gaussian is the one data set whose denoiser and probability flow are known exactly, on every path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sfumato.core.seams import Cond
from sfumato.diffusion.path import Path, PathConfig, make_path, ve_path
from sfumato.diffusion.samplers import SAMPLERS

PATHS = {kind: make_path(PathConfig(kind=kind)) for kind in ("rf", "vp-cosine", "vp-linear")} | {"ve": ve_path()}


@dataclass
class Gaussian:
    """x0 ~ N(mean, std^2). `calls` counts the evaluations of its denoisers."""

    mean: float = 0.7
    std: float = 0.5
    calls: int = 0

    def denoise(self, path: Path) -> Callable[[Tensor, Tensor], Tensor]:
        """E[x0 | x_t] = m + alpha s^2 (x_t - alpha m) / (alpha^2 s^2 + sigma^2)."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            assert t.shape == x.shape[:1]
            assert t.dtype == x.dtype
            alpha, sigma = path.coefficients(t, x)
            return self.mean + alpha * self.std**2 * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

        return denoise

    def net(self, path: Path, convert: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Cond], Tensor]:
        """The perfect network of one kind of prediction."""
        denoise = self.denoise(path)
        return lambda x, t, cond: convert(denoise(x, t), x, t)

    def flow(self, path: Path, z: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z, with the same z all along one trajectory."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return alpha * self.mean + (alpha**2 * self.std**2 + sigma**2).sqrt() * z


@pytest.fixture
def calls_of() -> Callable[[str, int, Path], int]:
    """How often a sampler asks the network in so many steps from t = 1 to 0."""

    def calls(name: str, steps: int, path: Path) -> int:
        each = SAMPLERS[name].calls_per_step
        once = (each - 1) * (1 + (name == "dpmpp_sde" and path.reaches_zero))  # steps to sigma = 0, or from alpha = 0
        return steps * each - once + (name == "plms")  # whose first step needs one more

    return calls


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are tiny: a second thread only costs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    return PATHS[request.param]


@pytest.fixture
def rf() -> Path:
    return PATHS["rf"]


@pytest.fixture
def paths() -> dict[str, Path]:
    return PATHS
