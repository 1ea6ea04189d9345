"""Adversarial losses and penalties against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from sfumato.gans.discriminators import PatchConfig, PatchDiscriminator
from sfumato.losses.adversarial import adaptive_weight, discriminator_loss, generator_loss, lecam_penalty, r1_penalty
from sfumato.losses.pixels import logistic_nll, pixel_loss


def test_the_losses_are_their_formulas() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.0])
    assert float(discriminator_loss("hinge", real, fake)) == pytest.approx((0.25 + 0.5) / 2)
    assert float(discriminator_loss("non-saturating", torch.zeros(3), torch.zeros(3))) == pytest.approx(math.log(2))
    assert float(discriminator_loss("least-squares", torch.ones(2), -torch.ones(2))) == 0
    assert float(generator_loss("hinge", fake)) == 1.0
    assert float(generator_loss("non-saturating", torch.zeros(3))) == pytest.approx(math.log(2))
    assert float(generator_loss("least-squares", torch.ones(3))) == 0
    for f in (lambda: discriminator_loss("wgan", real, fake), lambda: generator_loss("wgan", fake)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"kind \(='wgan'\) must be"):
            f()


@pytest.mark.parametrize("kind", ["hinge", "non-saturating", "least-squares"])
def test_the_generator_climbs_what_the_discriminator_pushes_down(kind: str) -> None:
    fake = torch.full((4,), -0.3, requires_grad=True)
    up = torch.autograd.grad(generator_loss(kind, fake), fake)[0]  # type: ignore[arg-type]
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
