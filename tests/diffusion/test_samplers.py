import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from sfumato.diffusion.path import timesteps, ve_path
from sfumato.diffusion.precond import from_x0
from sfumato.diffusion.samplers import SAMPLERS, sample_ddim, sample_heun, sampler

f64 = torch.float64
DETERMINISTIC = [name for name, info in SAMPLERS.items() if not info.stochastic]
Z = torch.linspace(-2, 2, 5, dtype=f64)[:, None]


def last(steps):
    for step in steps:  # noqa: B007
        pass
    return step


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def errors_between(gaussian, path, name, counts, start, end):
    """Root mean square error at `end` of trajectories that are exact at `start`."""
    out = []
    for n in counts:
        ts = torch.linspace(start, end, n + 1, dtype=f64)
        x = last(SAMPLERS[name].function(gaussian.denoise(path), gaussian.flow(path, Z, ts[:1]), ts, path)).x
        out.append((x - gaussian.flow(path, Z, ts[-1:])).square().mean().sqrt().item())
    return out


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence_between_interior_times(gaussian, path, name):
    counts = [64, 128, 256, 512] if name == "unipc" else [16, 32, 64, 128]
    path = ve_path(sigma_max=10.0, rho=3.0) if path.kind == "ve" else path
    order = slope(counts, errors_between(gaussian, path, name, counts, 0.9, 0.3))
    assert order > SAMPLERS[name].order - 0.25
    assert order < SAMPLERS[name].order + 0.25 or name in ("lms", "plms")  # the better the shorter their first step


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_full_range_converges_to_the_exact_answer(gaussian, path, name):
    """From alpha = 0 (where the path has it) to sigma = 0. On "vp-linear" sigma^2 is linear in t at 0, so that the last step is of order 1."""
    errors, wanted = [], gaussian.mean + gaussian.std * Z
    for n in (32, 256):
        ts = timesteps(path, n)
        x = last(SAMPLERS[name].function(gaussian.denoise(path), gaussian.flow(path, Z, ts[:1]), ts, path)).x
        errors.append((x - wanted).abs().max().item())
    assert errors[1] < (0.03 if SAMPLERS[name].order == 1 or path.kind == "vp-linear" else 0.002)
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if n != "lms"])  # whose last step goes by four slopes, not to what the network says
@pytest.mark.parametrize("schedule", ["lambda", "karras"])
def test_schedules_in_lambda_converge_up_to_their_last_step(gaussian, path, name, schedule):
    """However many steps there are, the last one is from the same small sigma: what it alone does is the limit, near the exact answer."""
    errors = []
    for n in (32, 256):
        ts = timesteps(path, n, schedule=schedule)
        before = ts[-2:-1]
        limit = gaussian.denoise(path)(gaussian.flow(path, Z, before), before.expand(5))
        x = last(SAMPLERS[name].function(gaussian.denoise(path), gaussian.flow(path, Z, ts[:1]), ts, path)).x
        errors.append((x - limit).abs().max().item())
    assert (limit - gaussian.mean - gaussian.std * Z).abs().max() < 0.002
    assert errors[1] < (0.03 if SAMPLERS[name].order == 1 else 0.002)
    assert errors[1] < errors[0] / 4


def affine_moments(gaussian, path, ts, function):
    """Mean and variance at ts[-1] of a sampler begun from the true marginal at ts[0], with no sampling.

    The denoiser is affine, so x_end = c + a x_start + sum_i b_i noise_i; row 0 of one batch finds c, row 1 a + c, row 2 + i b_i + c.
    """
    n = len(ts) - 1
    x = torch.zeros(n + 2, 1, dtype=f64)
    x[1] = 1

    def noise(i):
        basis = torch.zeros(n + 2, 1, dtype=f64)
        basis[2 + i] = 1
        return basis

    rows = last(function(gaussian.denoise(path), x, ts, path, noise=noise)).x[:, 0]
    c, a, b = rows[0], rows[1] - rows[0], rows[2:] - rows[0]
    mean, variance = true_moments(gaussian, path, ts[0])
    return (c + a * mean).item(), (a**2 * variance + b.square().sum()).item()


def true_moments(gaussian, path, t):
    alpha, sigma = path.alpha(t), path.sigma(t)
    return (alpha * gaussian.mean).item(), (alpha**2 * gaussian.std**2 + sigma**2).item()


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_weak_order_of_ancestral_sampling(gaussian, path, eta):
    path = ve_path(sigma_max=10.0, rho=3.0) if path.kind == "ve" else path
    counts, errors = [32, 64, 128, 256], []
    for n in counts:
        ts = torch.linspace(0.9, 0.1, n + 1, dtype=f64)
        got, wanted = affine_moments(gaussian, path, ts, partial(sample_ddim, eta=eta)), true_moments(gaussian, path, ts[-1])
        errors.append([abs(g - w) for g, w in zip(got, wanted, strict=True)])
    mean, variance = np.array(errors).T
    assert slope(counts, variance) > 0.85
    assert variance[-1] < 0.02
    assert mean.max() < 1e-12 or slope(counts, mean) > 0.85


def test_weak_order_of_sde_samplers(gaussian, path):
    """The mean is exact and the variance of order 2; a third D makes it better, but on a path whose steps differ much not of a higher order."""
    path = ve_path(sigma_max=10.0, rho=3.0) if path.kind == "ve" else path
    counts, errors = [32, 64, 128, 256], {"dpmpp_2m_sde": [], "dpmpp_3m_sde": []}
    for name, found in errors.items():
        for n in counts:
            ts = torch.linspace(0.9, 0.1, n + 1, dtype=f64)
            (mean, variance), wanted = affine_moments(gaussian, path, ts, SAMPLERS[name].function), true_moments(gaussian, path, ts[-1])
            assert mean == pytest.approx(wanted[0], abs=1e-9)
            found.append(abs(variance - wanted[1]))
    assert slope(counts, errors["dpmpp_2m_sde"]) > 1.85
    assert errors["dpmpp_3m_sde"][-1] < errors["dpmpp_2m_sde"][-1]


def test_consistency_sampling_noises_what_was_denoised(gaussian, rf):
    """Of a denoiser that knows the answer it is the marginal at every time, exactly."""
    ts, known = timesteps(rf, 4), torch.full((3, 1), 0.3, dtype=f64)
    noise = torch.arange(12, dtype=f64).reshape(4, 3, 1)
    steps = list(SAMPLERS["lcm"].function(lambda x, t: known, torch.randn(3, 1, dtype=f64), ts, rf, noise=noise.__getitem__))
    for i, step in enumerate(steps[:-1]):
        assert torch.allclose(step.x, rf.alpha(ts[i + 1]) * known + rf.sigma(ts[i + 1]) * noise[i])
    assert torch.equal(steps[-1].x, known)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"])
def test_samplers_that_need_noise_say_so(gaussian, rf, name):
    with pytest.raises(ValueError, match="this sampler needs noise"):
        last(SAMPLERS[name].function(gaussian.denoise(rf), torch.randn(2, 1), timesteps(rf, 2), rf))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_moments_over_the_full_range(gaussian, path, eta):
    errors = []
    for n in (50, 400):
        mean, variance = affine_moments(gaussian, path, timesteps(path, n), partial(sample_ddim, eta=eta))
        errors.append(abs(mean - gaussian.mean) + abs(variance - gaussian.std**2))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_steps_and_times(gaussian, path, name, calls_of):
    ts, info = timesteps(path, 7), SAMPLERS[name]
    steps = list(info.function(gaussian.denoise(path), torch.randn(3, 1), ts, path, noise=lambda i: torch.randn(3, 1)))
    assert gaussian.calls == calls_of(name, 7, path)
    assert [s.i for s in steps] == list(range(7))
    assert [s.t for s in steps] == ts[1:].tolist()
    assert torch.equal(steps[-1].x, steps[-1].x0) or name in ("lms", "plms")  # which go by slopes to the end


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_step_is_the_denoiser(gaussian, path, name):
    x = torch.randn(3, 1, dtype=f64)
    step = last(SAMPLERS[name].function(gaussian.denoise(path), x, timesteps(path, 1), path, noise=lambda i: torch.zeros_like(x)))
    assert torch.equal(step.x, gaussian.denoise(path)(x, torch.ones(3, dtype=f64)))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("given", "state"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (f64, f64)])
def test_state_is_at_least_fp32_and_fp32_follows_fp64(gaussian, rf, name, given, state):
    x, ts = torch.randn(3, 1, generator=torch.Generator().manual_seed(1)).to(given), timesteps(rf, 20)
    noise = [torch.randn(3, 1, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    run = [last(SAMPLERS[name].function(gaussian.denoise(rf), v, ts, rf, noise=noise.__getitem__)).x for v in (x, x.double())]
    assert run[0].dtype == state
    assert torch.allclose(run[0].double(), run[1], atol=1e-5)


def test_a_network_of_another_dtype_leaves_the_state_alone(rf):
    steps = list(sample_heun(lambda x, t: x.bfloat16(), torch.randn(2, 1), timesteps(rf, 3), rf))
    assert all(s.x.dtype == s.x0.dtype == torch.float32 for s in steps)


def test_eta_zero_is_euler_in_sigma_over_alpha(gaussian, paths):
    path = paths["vp-linear"]
    ts, x = torch.linspace(0.9, 0.2, 6, dtype=f64), torch.randn(4, 1, dtype=f64)
    y, k = x / path.alpha(ts[0]), path.sigma(ts) / path.alpha(ts)
    for i in range(5):
        t = ts[i].expand(4)
        eps = from_x0("eps", gaussian.denoise(path)(y * path.alpha(ts[i]), t), y * path.alpha(ts[i]), t, path)
        y = y + (k[i + 1] - k[i]) * eps
    got = last(SAMPLERS["euler"].function(gaussian.denoise(path), x, ts, path)).x
    assert torch.allclose(got, y * path.alpha(ts[-1]), atol=1e-12)


def test_on_the_rectified_flow_euler_and_heun_are_the_textbook_ones_in_t(gaussian, rf):
    ts, x = timesteps(rf, 5), torch.randn(4, 1, dtype=f64)

    def velocity(x, t):
        return from_x0("flow", gaussian.denoise(rf)(x, t.expand(4)), x, t.expand(4), rf)

    euler = heun = x
    for t, s in pairwise(ts):
        euler = euler + (s - t) * velocity(euler, t)
        ahead = heun + (s - t) * velocity(heun, t)
        heun = ahead if s == 0 else heun + (s - t) / 2 * (velocity(heun, t) + velocity(ahead, s))
    assert torch.allclose(last(SAMPLERS["euler"].function(gaussian.denoise(rf), x, ts, rf)).x, euler, atol=1e-12)
    assert torch.allclose(last(SAMPLERS["heun"].function(gaussian.denoise(rf), x, ts, rf)).x, heun, atol=1e-12)


@pytest.mark.parametrize("kind", ["ve", "vp-linear"])
def test_heun_is_the_one_of_edm_in_sigma_over_alpha(gaussian, paths, kind):
    path = ve_path(sigma_max=10.0, rho=3.0) if kind == "ve" else paths[kind]
    ts, x = torch.linspace(0.9, 0.2, 6, dtype=f64), torch.randn(4, 1, dtype=f64)
    y, k = x / path.alpha(ts[0]), path.sigma(ts) / path.alpha(ts)

    def slope_at(y, i):
        return (y - gaussian.denoise(path)(y * path.alpha(ts[i]), ts[i].expand(4))) / k[i]

    for i in range(5):
        first, step = slope_at(y, i), k[i + 1] - k[i]
        y = y + step * (first + slope_at(y + step * first, i + 1)) / 2
    got = last(SAMPLERS["heun"].function(gaussian.denoise(path), x, ts, path)).x
    assert torch.allclose(got, y * path.alpha(ts[-1]), atol=1e-12)


def test_s_up_is_that_of_ddpm_on_vp(paths):
    """eta = 1: the noise of a step has the variance of q(x' | x, x0), (1 - a') / (1 - a) * (1 - a / a'), a = alpha^2 (arXiv 2006.11239, eq. 7)."""
    path, ts = paths["vp-cosine"], torch.tensor([0.8, 0.5], dtype=f64)
    a, b = path.alpha(ts).square().tolist()
    quiet, loud = (
        last(sample_ddim(lambda x, t: x, torch.ones(1, 1, dtype=f64), ts, path, eta=1.0, noise=lambda i, z=z: z * torch.ones(1, 1))).x for z in (0, 1)
    )
    assert math.isclose((loud - quiet).item() ** 2, (1 - b) / (1 - a) * (1 - a / b))


def test_noise_is_asked_for_once_a_step_that_adds_any(gaussian, rf):
    asked = []

    def noise(i):
        asked.append(i)
        return torch.zeros(1, 1)

    last(SAMPLERS["ancestral"].function(gaussian.denoise(rf), torch.zeros(1, 1), timesteps(rf, 5), rf, noise=noise))
    assert asked == [0, 1, 2, 3]  # none in the step to sigma = 0
    for name in DETERMINISTIC:
        last(SAMPLERS[name].function(gaussian.denoise(rf), torch.zeros(1, 1), timesteps(rf, 5), rf, noise=noise))
    assert len(asked) == 4


def test_a_sampler_can_be_stopped(gaussian, rf):
    steps = SAMPLERS["euler"].function(gaussian.denoise(rf), torch.zeros(1, 1), timesteps(rf, 50), rf)
    next(steps)
    steps.close()
    assert gaussian.calls == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d, x, rf: sampler("dpmpp2m"), "did you mean 'dpmpp_2m'"),
        (lambda d, x, rf: last(sample_heun(d, x, torch.ones(1), rf)), r"steps \(=0\)"),
        (lambda d, x, rf: last(sample_heun(d, x, torch.tensor([0.5, 0.5]), rf)), "fall strictly"),
        (lambda d, x, rf: last(sample_heun(d, x, torch.tensor([1.5, 0.5]), rf)), "at most 1"),
        (lambda d, x, rf: last(sample_heun(d, x, torch.tensor([0.5, float("nan")]), rf)), "fall strictly"),
        (lambda d, x, rf: last(sample_ddim(d, x, timesteps(rf, 2), rf, eta=1.0)), "needs noise"),
        (lambda d, x, rf: last(sample_ddim(d, x, timesteps(rf, 2), rf, eta=2.0)), r"eta \(=2.0\)"),
    ],
)
def test_errors_name_the_value(gaussian, rf, make, message):
    with pytest.raises(ValueError, match=message):
        make(gaussian.denoise(rf), torch.zeros(1, 1), rf)


def test_the_table_is_found_by_name():
    for name, info in SAMPLERS.items():
        assert sampler(name) is info
