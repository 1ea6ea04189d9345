import math

import pytest
import torch

from sfumato.core.config import from_json, to_json
from sfumato.diffusion.path import PathConfig, make_path, timesteps, ve_path

f64 = torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_ends_are_exact(path, dtype):
    t = torch.tensor([0.0, 1.0], dtype=dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha[1] == 0) == path.reaches_zero
    assert path.lam(t)[0] == math.inf
    assert (path.lam(t)[1] == -math.inf) == path.reaches_zero


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (f64, 1e-9)])
def test_t_of_lambda_inverts_lambda_which_falls(path, dtype, tolerance):
    t = torch.linspace(0.01, 0.99, 499, dtype=dtype)
    lam = path.lam(t)
    assert (lam.diff() < 0).all()
    assert torch.allclose(path.t_of_lambda(lam), t, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["vp-cosine", "vp-linear"])
def test_vp_preserves_variance(paths, kind):
    t = torch.linspace(0, 1, 777, dtype=f64)
    assert torch.allclose(paths[kind].alpha(t) ** 2 + paths[kind].sigma(t) ** 2, torch.ones_like(t), atol=1e-14)


def test_vp_linear_meets_the_discrete_products_of_stable_diffusion(paths):
    betas = [(0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for i in range(1000)]
    product = torch.tensor([math.prod(1 - b for b in betas[: i + 1]) for i in range(1000)], dtype=f64)
    t = torch.arange(1, 1001, dtype=f64) / 1000
    assert torch.allclose(paths["vp-linear"].alpha(t) ** 2, product, rtol=1e-10)
    assert abs(paths["vp-linear"].alpha(t[-1:]).item() ** 2 - 0.00466) < 1e-5  # known of Stable Diffusion 1


def test_t_of_lambda_stays_in_range_outside_of_what_vp_linear_reaches(paths):
    t = paths["vp-linear"].t_of_lambda(torch.tensor([-50.0, 50.0], dtype=f64))
    assert t[0] == 1
    assert 0 <= t[1] < 1e-12


def test_mix(path):
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.3, 1.0])
    x = path.mix(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    assert torch.allclose(x[1], path.alpha(t[1]) * x0[1] + path.sigma(t[1]) * noise[1])
    if path.reaches_zero:
        assert torch.equal(x[2], noise[2])
    assert path.mix(x0.bfloat16(), noise.bfloat16(), t).dtype == torch.float32
    assert path.mix(x0.double(), noise.double(), t).dtype == f64


@pytest.mark.parametrize("schedule", ["uniform", "lambda", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_timesteps_fall_from_one_to_zero(path, schedule, steps, shift):
    ts = timesteps(path, steps, schedule=schedule, shift=shift)
    assert ts.dtype == f64
    assert ts.shape == (steps + 1,)
    assert ts[0] == 1
    assert ts[-1] == 0
    assert (ts.diff() < 0).all()


def test_schedules_are_uniform_in_what_they_name(paths):
    lam = paths["vp-linear"].lam(timesteps(paths["vp-linear"], 10, schedule="lambda")[:-1])
    assert torch.allclose(lam.diff(), lam.diff().mean())
    k = torch.exp(-paths["vp-linear"].lam(timesteps(paths["vp-linear"], 10, schedule="karras")[:-1])) ** (1 / 7)
    assert torch.allclose(k.diff(), k.diff().mean())
    assert torch.allclose(timesteps(paths["rf"], 4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=f64))
    assert torch.allclose(timesteps(paths["rf"], 4, shift=3.0)[2], torch.tensor(0.75, dtype=f64))


def test_shift_on_the_rectified_flow_divides_the_signal_to_noise_ratio(rf):
    plain, shifted = timesteps(rf, 8), timesteps(rf, 8, shift=3.0)
    assert torch.allclose(rf.lam(shifted[1:-1]), rf.lam(plain[1:-1]) - math.log(3))


def test_config_goes_through_json():
    config = PathConfig(kind="vp-linear", beta_end=0.02)
    assert from_json(PathConfig, to_json(config)) == config
    assert make_path(config).kind == "vp-linear"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rf: PathConfig(kind="vp-cosin"), "did you mean 'vp-cosine'"),
        (lambda rf: PathConfig(beta_start=0.5, beta_end=0.1), "beta_start"),
        (lambda rf: PathConfig(num_betas=0), "num_betas"),
        (lambda rf: ve_path(sigma_max=0.0), "sigma_max"),
        (lambda rf: timesteps(rf, 0), r"steps \(=0\)"),
        (lambda rf: timesteps(rf, 4, shift=0.0), "shift"),
        (lambda rf: timesteps(rf, 4, shift=math.inf), "shift"),
        (lambda rf: timesteps(rf, 4, schedule="lamda"), "did you mean 'lambda'"),
    ],
)
def test_errors_name_the_value(rf, make, message):
    with pytest.raises(ValueError, match=message):
        make(rf)
