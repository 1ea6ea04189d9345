"""Adversarial losses and penalties against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.gans.discriminators import PatchConfig, PatchDiscriminator
from sfumato.losses.adversarial import (
    KINDS,
    adaptive_weight,
    beside,
    between,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    middle,
    r1_penalty,
    slope_penalty,
)
from sfumato.losses.pixels import logistic_nll, pixel_loss


def test_the_losses_are_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    sigma = torch.sigmoid
    wanted = {
        "minimax": (-(sigma(real).log() + (1 - sigma(fake)).log()).mean(), (1 - sigma(fake)).log().mean()),
        "non-saturating": (-(sigma(real).log() + (1 - sigma(fake)).log()).mean(), -sigma(fake).log().mean()),
        "least-squares": ((1 + 0.25 + 1 + 1) / 4, (9 + 1) / 4),
        "hinge": (0.25 + 0.5, 1.0),
        "wasserstein": (-1.0 - 1.25, 1.0),
        "relativistic": (-sigma(real - fake).log().mean(), -sigma(fake - real).log().mean()),
    }
    assert set(wanted) == set(KINDS)
    for kind, (of_discriminator, of_generator) in wanted.items():
        assert float(discriminator_loss(kind, real, fake)) == pytest.approx(float(of_discriminator), rel=1e-6), kind  # type: ignore[arg-type]
        assert float(generator_loss(kind, fake, real)) == pytest.approx(float(of_generator), rel=1e-6), kind  # type: ignore[arg-type]
    for f in (lambda: discriminator_loss("wgan", real, fake), lambda: generator_loss("wgan", fake)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"kind \(='wgan'\) must be"):
            f()
    with pytest.raises(ValueError, match="relativistic compares with real pictures"):
        generator_loss("relativistic", fake)


@pytest.mark.parametrize("kind", KINDS)
def test_the_generator_climbs_what_the_discriminator_pushes_down(kind: str) -> None:
    fake = torch.full((4,), -0.3, requires_grad=True)
    up = torch.autograd.grad(generator_loss(kind, fake, torch.zeros(4)), fake)[0]  # type: ignore[arg-type]
    down = torch.autograd.grad(discriminator_loss(kind, torch.zeros(4), fake), fake)[0]  # type: ignore[arg-type]
    assert (up < 0).all()
    assert (down > 0).all()


def test_r1_of_a_linear_network_is_half_its_squared_weight() -> None:
    w = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    scores = (x * w).sum((1, 2, 3))
    assert float(r1_penalty(scores, x)) == pytest.approx(float(w.square().sum()) / 2, rel=1e-5)
    patches = torch.stack([scores, 2 * scores], 1)
    assert float(r1_penalty(patches, x)) == pytest.approx(9 * float(w.square().sum()) / 2, rel=1e-5)


def quadratic(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A critic x' A x / 2 + b x of pictures x "b 6" in fp64: (A, b, x, scores); its slope is A x + b."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(6, 6, generator=g, dtype=torch.float64)
    a = ((a + a.T) / 2).requires_grad_()
    b = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    return a, b, x, torch.einsum("bi,ij,bj->b", x, a, x) / 2 + x @ b


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("name", ["r1", "two-sided", "one-sided"])
def test_penalties_and_their_gradients_are_closed_forms(name: str, linear: bool) -> None:
    a, b, x, scores = quadratic()
    if linear:
        a = torch.zeros_like(a, requires_grad=True)
        scores = torch.einsum("bi,ij,bj->b", x, a, x) / 2 + x @ b
    slopes = x.detach() @ a.detach() + b.detach()  # "b 6"
    norm = slopes.norm(dim=1)
    if name == "r1":
        ours, value, outer = r1_penalty(scores, x), (norm.square() / 2).mean(), torch.ones_like(norm)
    else:
        over = norm - 1 if name == "two-sided" else (norm - 1).clamp(min=0)
        ours, value, outer = slope_penalty(scores, x, one_sided=name == "one-sided"), over.square().mean(), 2 * over / norm
    torch.testing.assert_close(ours, value, rtol=1e-6, atol=1e-9)
    of_a, of_b = torch.autograd.grad(ours, (a, b))
    steer = outer[:, None] * slopes / len(x)  # d penalty / d slope
    torch.testing.assert_close(of_b, steer.sum(0), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        of_a, torch.einsum("bi,bj->ij", x.detach(), steer) / 2 + torch.einsum("bi,bj->ij", steer, x.detach()) / 2, rtol=1e-6, atol=1e-9
    )


def test_slopes_that_are_nothing_have_no_gradient_that_is_no_number() -> None:
    w = torch.zeros(4, requires_grad=True)
    x = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(slope_penalty(x @ w, x), w)
    assert torch.isfinite(gradient).all()


def test_where_penalties_look() -> None:
    real, fake = torch.ones(4, 3, 2, 2), -torch.ones(4, 3, 2, 2)
    at = between(real, fake, torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert at[:, 0, 0, 0].tolist() == [-1.0, -0.5, 0.0, 1.0]
    x = torch.randn(64, 3, 4, 4)
    u = torch.ones_like(x)
    way = torch.linspace(0, 1, len(x))
    expected = (0.5 * float(x.std()) * way).reshape(-1, *[1] * (x.ndim - 1)).expand_as(x)
    torch.testing.assert_close(beside(x, u, way) - x, expected)


def test_halfway_where_only_differences_mean_something() -> None:
    real, fake = torch.tensor([3.0, 5.0]), torch.tensor([1.0, 1.0])
    assert float(middle("wasserstein", real, fake)) == 2.5
    assert float(middle("hinge", real, fake)) == 0


def test_lecam_is_its_formula() -> None:
    assert float(lecam_penalty(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([5.0, -1.0]))) == (4 + 16) / 2 + 25


def test_the_adaptive_weight_is_a_ratio_with_a_cap() -> None:
    assert float(adaptive_weight(torch.full((4,), 3.0), torch.full((4,), 1.5), most=10)) == pytest.approx(2, rel=1e-3)
    assert float(adaptive_weight(torch.ones(4), torch.zeros(4), most=10)) == 10


def test_charbonnier_is_between_the_two() -> None:
    a, b = torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4)
    assert float(pixel_loss(a, b, l1=0, charbonnier=1)[0]) == pytest.approx(math.sqrt(0.25 + 1e-6))
    assert float(pixel_loss(a, b, l1=2, mse=4)[0]) == pytest.approx(1 + 1)


def test_the_likelihood_sums_to_one_over_all_levels() -> None:
    levels = torch.arange(256) / 127.5 - 1
    for mean, log_scale in ((0.1, -2.0), (-1.2, -3.0), (0.9, -5.0), (0.0, -5.0)):
        x = levels.reshape(256, 1, 1, 1)
        p = torch.exp(-logistic_nll(x, torch.full_like(x, mean), torch.tensor(log_scale)))
        assert float(p.sum()) == pytest.approx(1, abs=2e-3)
        assert int(p.argmax()) == pytest.approx(min(max((mean + 1) * 127.5, 0), 255), abs=1)


@pytest.mark.parametrize("config", [PatchConfig(), PatchConfig(spectral=True, norm="none"), PatchConfig(layers=2, norm="batch", width=16)])
def test_a_score_sees_as_many_pixels_as_it_says(config: PatchConfig) -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(config).eval()
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    if config.norm == "group":  # whose statistics are of the whole picture
        for m in network.layers:
            if isinstance(m, torch.nn.GroupNorm):
                m.forward = lambda v: v  # type: ignore[method-assign]
    scores = network(x)
    middle = scores[0, 0, scores.shape[2] // 2, scores.shape[3] // 2]
    touched = torch.autograd.grad(middle, x)[0].abs().sum((0, 1)) > 0
    assert int(touched.any(0).sum()) == int(touched.any(1).sum()) == config.sees
    assert PatchConfig().sees == 70


def test_spectral_norms_bound_the_network() -> None:
    network = PatchDiscriminator(PatchConfig(spectral=True, norm="none", width=16, layers=2))
    x = torch.randn(2, 3, 32, 32)
    for _ in range(20):
        network(x)
    for m in network.modules():
        if isinstance(m, torch.nn.Conv2d):
            assert float(torch.linalg.matrix_norm(m.weight.flatten(1), 2)) == pytest.approx(1, rel=0.05)
