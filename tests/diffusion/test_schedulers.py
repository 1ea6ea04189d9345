"""Samplers and spacings beside diffusers' schedulers: the same network, the same noise, the same picture."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from sfumato.core.seams import Cond
from sfumato.diffusion.guidance import guided
from sfumato.diffusion.path import ALIGNED, PathConfig, discrete_times, make_path, timesteps
from sfumato.diffusion.precond import Precond
from sfumato.diffusion.samplers import sampler

PATH = make_path(PathConfig(kind="vp-linear"))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
THEIRS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero"}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"final_sigmas_type": "zero", "algorithm_type": "sde-dpmsolver++"}),
}
NOISY = ("ancestral", "dpmpp_2m_sde", "lcm")
UNSCALED = ("ddim", "plms", "unipc", "dpmpp_2m", "dpmpp_2m_sde")  # whose schedulers begin with unit noise whatever the first time


SAID = [(n, p) for n in THEIRS for p in ("epsilon", "v_prediction") if (n, p) != ("plms", "v_prediction")]  # which weighs v's there, and not slopes


def said(x: Tensor, step: Tensor) -> Tensor:
    """What stands for a network: neither linear nor the same at any two steps or places."""
    return torch.tanh(1.3 * x + torch.roll(x, 1, -1) * 0.4) * (0.6 + 0.4 * (step / 170).cos()) + 0.2 * (step / 40).sin()


def net(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    return said(x, (t * 1000 - 1)[:, None, None, None])


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("name", "prediction"), SAID)
def test_samplers_draw_what_diffusers_draws(name: str, spacing: str, steps: int, prediction: str) -> None:
    made, more = THEIRS[name]
    theirs = made(**BETAS, **more, timestep_spacing=spacing, steps_offset=1, prediction_type=prediction)
    theirs.set_timesteps(steps)
    torch.manual_seed(0)
    begun, fresh = torch.randn(2, 4, 6, 6), [torch.randn(2, 4, 6, 6) for _ in range(steps)]
    x = stepped(theirs, begun * theirs.init_noise_sigma, fresh, name)
    way = "leading-open" if name.startswith(("dpmpp", "unipc")) and spacing == "leading" else spacing
    ts = discrete_times(steps, spacing=way, ends="first" if name in ("ddim", "plms") else "clean")  # type: ignore[arg-type]
    denoise = guided([(Precond(net, "eps" if prediction == "epsilon" else "v", PATH), Cond(), 1.0)])
    first = begun * (PATH.sigma(ts[:1]) if spacing == "trailing" and name not in UNSCALED else 1.0)  # what schedulers over sigma begin with there
    *_, last = sampler(name).function(denoise, first.float(), ts, PATH, noise=lambda i: fresh[i])
    assert float((last.x - x).abs().max()) <= 1e-4 * max(1.0, float(x.abs().max()))


def stepped(theirs: Any, x: Tensor, fresh: list[Tensor], name: str) -> Tensor:
    """A scheduler's way from noise to a picture, with the same noise as ours."""
    noise = iter(fresh)
    with pytest.MonkeyPatch.context() as m:
        if name in NOISY:
            m.setattr(f"{type(theirs).__module__}.randn_tensor", lambda *a, **k: next(noise))
        for step in theirs.timesteps:
            x = theirs.step(said(theirs.scale_model_input(x, step), step), step, x).prev_sample
    return x


@pytest.mark.parametrize("steps", [10, 25])
def test_single_steps_draw_what_diffusers_draws(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file asks for torchsde, whose Brownian path is not needed where the noise is handed to both sides."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    made = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    theirs = made(**BETAS, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(steps)
    torch.manual_seed(0)
    begun, fresh = torch.randn(2, 4, 6, 6), [torch.randn(2, 4, 6, 6) for _ in range(2 * steps)]
    drawn: list[tuple[float, float, Tensor]] = []  # of this step: from, to, and the noise between

    def brownian(start: Tensor, end: Tensor) -> Tensor:
        """Steps come in pairs: to the middle, and over the whole, of which the first is a part."""
        a = fresh[2 * (brownian.calls // 2)] if brownian.calls % 2 == 0 else drawn[-1][2]  # type: ignore[attr-defined]
        if brownian.calls % 2:  # type: ignore[attr-defined]
            (begin, middle, a), b = drawn[-1], fresh[brownian.calls]  # type: ignore[attr-defined]
            first, second = begin - middle, middle - float(end)
            a = (first**0.5 * a + second**0.5 * b) / (first + second) ** 0.5
        drawn.append((float(start), float(end), a))
        brownian.calls += 1  # type: ignore[attr-defined]
        return a

    brownian.calls = 0  # type: ignore[attr-defined]
    theirs.noise_sampler = brownian
    x = begun * theirs.init_noise_sigma
    for step in theirs.timesteps:
        x = theirs.step(said(theirs.scale_model_input(x, step), step.float()), step, x).prev_sample
    handed = iter(fresh)
    denoise = guided([(Precond(net, "eps", PATH), Cond(), 1.0)])
    *_, last = sampler("dpmpp_sde").function(denoise, begun, discrete_times(steps), PATH, noise=lambda i: next(handed))
    assert float((last.x - x).abs().max()) <= 1e-4 * float(x.abs().max())


@pytest.mark.parametrize(
    ("name", "schedule"),  # dpmpp_2m and unipc cut the times of lambda to whole steps in diffusers, 998.9999 to 998 too
    [
        (n, s)
        for n in ("euler", "heun", "dpmpp_2m", "unipc", "lms")
        for s in ("karras", "lambda")
        if (n, s) not in (("dpmpp_2m", "lambda"), ("unipc", "lambda"))
    ],
)
def test_schedules_over_sigma_are_those_of_diffusers(name: str, schedule: str) -> None:
    made, more = THEIRS[name]
    theirs = made(**BETAS, **more, timestep_spacing="linspace", **{"use_karras_sigmas" if schedule == "karras" else "use_exponential_sigmas": True})
    theirs.set_timesteps(12)
    torch.manual_seed(0)
    begun = torch.randn(2, 4, 6, 6)
    x = stepped(theirs, begun * theirs.init_noise_sigma, [], name)
    ts = timesteps(PATH, 12, schedule=schedule)  # type: ignore[arg-type]
    rounded = name in ("dpmpp_2m", "unipc")  # which ask at whole steps, between which their sigmas lie
    heard = (lambda x, t, cond: net(x, (t * 1000).round() / 1000, cond)) if rounded else net
    denoise = guided([(Precond(heard, "eps", PATH), Cond(), 1.0)])
    first = begun * (1.0 if name in UNSCALED else PATH.sigma(ts[:1]))
    *_, last = sampler(name).function(denoise, first.float(), ts, PATH)
    assert float((last.x - x).abs().max()) <= 1e-4 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("betas", ["scaled_linear", "linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_betas_are_those_of_diffusers(betas: str, zero_snr: bool) -> None:
    theirs = EulerDiscreteScheduler(**(BETAS | {"beta_schedule": betas}), rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing")
    path = make_path(PathConfig(kind="vp-linear", betas=betas, zero_snr=zero_snr))  # type: ignore[arg-type]
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(path.alpha(t).square(), theirs.alphas_cumprod.double(), rtol=1e-3, atol=2e-7)
    assert torch.allclose(path.alpha(t[::9]).square() + path.sigma(t[::9]).square(), torch.ones(112, dtype=torch.float64))


def test_aligned_steps_are_the_published_ones() -> None:
    for schedule, known in ALIGNED.items():
        sigmas = torch.exp(-PATH.lam(timesteps(PATH, 10, schedule=schedule)))[:-1]  # type: ignore[arg-type]
        assert torch.allclose(sigmas, torch.tensor(known[:-1], dtype=torch.float64), rtol=1e-3), schedule
        assert len(timesteps(PATH, 25, schedule=schedule)) == 26  # type: ignore[arg-type]
    edm = torch.exp(-PATH.lam(timesteps(PATH, 8, schedule="edm")))
    assert float(edm[0]) == pytest.approx(14.6146, rel=1e-4)
    assert float(edm[-2]) == pytest.approx(0.002, rel=1e-2)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_consistency_models_draw_what_diffusers_draws(steps: int) -> None:
    theirs = LCMScheduler(**BETAS, prediction_type="epsilon")
    theirs.set_timesteps(steps)
    torch.manual_seed(0)
    begun, fresh = torch.randn(2, 4, 6, 6), [torch.randn(2, 4, 6, 6) for _ in range(steps)]
    ts = torch.cat([(theirs.timesteps.double() + 1) / 1000, torch.zeros(1)])
    denoise = guided([(Precond(net, "eps", PATH), Cond(), 1.0)])
    *_, last = sampler("lcm").function(denoise, begun, ts, PATH, noise=fresh.__getitem__)
    x = stepped(theirs, begun, fresh, "lcm")
    assert float((last.x - x).abs().max()) <= 1e-4 * float(x.abs().max())


def test_spacings_are_those_of_diffusers() -> None:
    for steps in (1, 7, 25, 50, 999, 1000):
        for spacing in ("leading", "trailing", "linspace"):
            theirs = DDIMScheduler(**BETAS, timestep_spacing=spacing, steps_offset=0)
            theirs.set_timesteps(steps)
            found = discrete_times(steps, spacing=spacing, offset=0)  # type: ignore[arg-type]
            assert (found[:-1] * 1000 - 1).round().long().tolist() == theirs.timesteps.tolist(), (spacing, steps)
            assert len(found) == steps + 1
            assert bool((found.diff() < 0).all())


def test_what_cannot_be_spaced_is_said() -> None:
    with pytest.raises(ValueError, match="did you mean 'leading'"):
        discrete_times(10, spacing="leding")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steps \(=1001\) must be from 1 to 1000"):
        discrete_times(1001)
    with pytest.raises(ValueError, match=r"with offset \(=1\) would go beyond the 1000 steps"):
        discrete_times(1000, offset=1)
