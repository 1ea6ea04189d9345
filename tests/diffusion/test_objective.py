import math

import numpy as np
import pytest
import torch

from sfumato.core.seams import Cond
from sfumato.diffusion.objective import ObjectiveConfig, draw_t, loss, snr_weight
from sfumato.diffusion.path import PathConfig, make_path
from sfumato.diffusion.precond import from_x0, target

f64 = torch.float64
KINDS = ["v", "eps", "x0", "flow"]


def kinds_of(path):
    return [k for k in KINDS if k != "flow" or path.kind == "rf"]


def test_the_exact_network_has_no_loss(path):
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 1.0])
    for kind in kinds_of(path):
        value, stats = loss(lambda x, t, c, k=kind: target(k, x0, noise, t, path), x0, noise, t, Cond(), path, ObjectiveConfig(prediction=kind))
        assert value == 0
        assert stats["mse"] == 0
        assert stats["target_square"] > 0


def test_the_minimum_is_the_gaussians_denoiser(path, gaussian):
    """Over a quadrature of x0 and noise (exact for a quadratic) the gradient is zero at the closed form, and not elsewhere."""
    z, w = np.polynomial.hermite_e.hermegauss(5)
    a, b = (torch.tensor(v.ravel(), dtype=f64)[:, None] for v in np.meshgrid(z, z))
    weight = torch.tensor(np.outer(w, w).ravel() / w.sum() ** 2 * 25, dtype=f64)
    x0, t = gaussian.mean + gaussian.std * a, torch.full((25,), 0.4, dtype=f64)
    perfect = gaussian.denoise(path)
    for kind in kinds_of(path):
        scale, offset = torch.ones(1, dtype=f64, requires_grad=True), torch.zeros(1, dtype=f64, requires_grad=True)

        def net(x, t, cond, kind=kind, scale=scale, offset=offset):
            return from_x0(kind, perfect(x, t), x, t, path) + (scale - 1) * x + offset

        for gamma in (None, 5.0):
            config = ObjectiveConfig(prediction=kind, min_snr_gamma=gamma)
            value, _ = loss(net, x0, b, t, Cond(), path, config, weight)
            slopes = torch.autograd.grad(value, [scale, offset])
            assert max(s.abs().item() for s in slopes) < 1e-9, kind
        shifted, _ = loss(lambda *args, net=net: net(*args) + 0.1, x0, b, t, Cond(), path, ObjectiveConfig(prediction=kind), weight)
        plain, _ = loss(net, x0, b, t, Cond(), path, ObjectiveConfig(prediction=kind), weight)
        assert math.isclose((shifted - plain).item(), 0.01, rel_tol=1e-6)


def test_loss_is_fp32_whatever_the_network_is(rf):
    x0, noise, t = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4).bfloat16(), torch.tensor([0.2, 0.7])
    value, stats = loss(lambda x, t, c: x.bfloat16(), x0, noise, t, Cond(), rf, ObjectiveConfig())
    assert value.dtype == stats["mse"].dtype == torch.float32


def test_weight_counts_each_sample(rf):
    x0, noise, t = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.2, 0.7])
    first, _ = loss(lambda x, t, c: 0 * x, x0, noise, t, Cond(), rf, ObjectiveConfig(), torch.tensor([1.0, 0.0]))
    assert torch.allclose(first, (noise - x0)[0].square().mean() / 2)


def test_min_snr_weighs_every_prediction_as_the_same_error_of_x0(path):
    """weight * (error of the output)^2 = min(SNR, gamma) * (error of x0)^2."""
    t, gamma = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=f64), 5.0
    wanted = (path.alpha(t) / path.sigma(t)).square().clamp_max(gamma)
    x_t, x0 = torch.randn(4, dtype=f64), torch.randn(4, dtype=f64)
    for kind in kinds_of(path):
        error = from_x0(kind, x0 + 1, x_t, t, path) - from_x0(kind, x0, x_t, t, path)
        assert torch.allclose(snr_weight(kind, t, path, gamma) * error.square(), wanted), kind
        assert snr_weight(kind, torch.tensor([0.0, 1.0], dtype=f64), path, gamma).isfinite().all()


@pytest.mark.parametrize(("P_mean", "P_std"), [(0.0, 1.0), (0.8, 0.6)])
def test_logit_normal_quantiles(P_mean, P_std):
    config = ObjectiveConfig(P_mean=P_mean, P_std=P_std, uniform_fraction=0.0)
    z = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=f64)
    t = draw_t(config, torch.special.ndtr(z), torch.full((5,), 0.5, dtype=f64))
    assert torch.allclose(t, torch.sigmoid(P_mean + P_std * z))


def test_a_fraction_of_the_times_is_uniform():
    config = ObjectiveConfig(uniform_fraction=0.25)
    middles = (torch.arange(400, dtype=f64) + 0.5) / 400
    u, choose = middles.repeat(400), middles.repeat_interleave(400)
    t = draw_t(config, u, choose)
    for q in (0.02, 0.1, 0.5, 0.9, 0.98):
        logit = torch.logit(torch.tensor(q, dtype=f64))
        assert abs((t <= q).double().mean() - (0.25 * q + 0.75 * torch.special.ndtr(logit))) < 0.003


def test_uniform_times_and_ends():
    u = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(draw_t(ObjectiveConfig(t_sampling="uniform"), u, u), u)
    assert torch.equal(draw_t(ObjectiveConfig(), u, torch.ones(3))[[0, 2]], u[[0, 2]])  # finite even for draws of exactly 0 or 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prediction": "velocity"}, "prediction"),
        ({"t_sampling": "logit-norml"}, "did you mean 'logit-normal'"),
        ({"P_std": 0.0}, "P_std"),
        ({"uniform_fraction": 1.5}, "uniform_fraction"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma"),
    ],
)
def test_errors_name_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**values)


def test_loss_refuses_flow_where_the_path_has_none(paths):
    with pytest.raises(ValueError, match="use 'v'"):
        loss(lambda x, t, c: x, torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), Cond(), paths["vp-cosine"], ObjectiveConfig())


def test_dead_channels_do_not_count() -> None:
    """Neither in the loss nor in the gradient: a network may say anything there."""
    path = make_path(PathConfig())
    x0, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.full((4,), 0.5)
    live = torch.tensor([True, False, True])
    said = torch.zeros(4, 3, 2, 2, requires_grad=True)
    value, _ = loss(lambda x, t, c: said, x0, noise, t, Cond(), path, ObjectiveConfig(), live=live)
    value.backward()
    torch.testing.assert_close(value.detach(), (noise - x0)[:, live].square().mean())
    assert said.grad is not None
    assert said.grad[:, 1].abs().max().item() == 0
    assert said.grad[:, 0].abs().min().item() > 0
