from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig, measure_latents
from sfumato.codecs.bottlenecks.kl import KL, KLConfig, split
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.core.config import from_json, to_json

CONFIGS = [
    (ConvnetConfig(patch=2, widths=(16, 32), encoder_blocks=(1, 1), decoder_blocks=(1, 1)), 4, 4),
    (ConvnetConfig(patch=1, widths=(16, 16, 32), encoder_blocks=(0, 1, 1), decoder_blocks=(1, 0, 2), image_channels=3), 8, 4),
    (ConvnetConfig(patch=4, widths=(32,), encoder_blocks=(2,), decoder_blocks=(1,), image_channels=1), 3, 4),
    (ConvnetConfig(patch=2, widths=(16, 16, 16), encoder_blocks=(0, 0, 0), decoder_blocks=(0, 0, 0)), 2, 8),
]


def small(channels: int = 4) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(AutoencoderConfig(convnet=CONFIGS[0][0], bottleneck=KLConfig(channels=channels)))


def pictures(n: int = 6, size: int = 16) -> Tensor:
    return torch.rand(n, 4, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(("convnet", "channels", "factor"), CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (8, 24)])
def test_shapes(convnet: ConvnetConfig, channels: int, factor: int, height: int, width: int) -> None:
    codec = Autoencoder(AutoencoderConfig(convnet=convnet, bottleneck=KLConfig(channels=channels)))
    x = torch.rand(2, convnet.image_channels, height, width) * 2 - 1
    latents = codec.encode(x)
    assert codec.spec.factor == convnet.factor == factor
    assert (codec.spec.image_channels, codec.spec.latent_channels) == (convnet.image_channels, channels)
    assert latents.mean.shape == latents.std.shape == (2, channels, height // factor, width // factor)
    assert latents.indices is None
    assert codec.decode(latents.mean).shape == x.shape
    y, loss, stats = codec(x, torch.randn_like(latents.mean))
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    assert loss.shape == ()
    assert set(stats) == {"posterior_std", "latent_std", "kl_channels"}


def test_config_round_trip_and_refusals() -> None:
    config = AutoencoderConfig(convnet=CONFIGS[1][0], bottleneck=KLConfig(channels=8))
    assert from_json(AutoencoderConfig, json.loads(json.dumps(to_json(config)))) == config
    with pytest.raises(ValueError, match="same length"):
        ConvnetConfig(widths=(16, 32), encoder_blocks=(1,), decoder_blocks=(1, 1))
    with pytest.raises(ValueError, match=r"widths \(=\(16, 24, 32\)\) must be multiples of 16"):
        ConvnetConfig(widths=(16, 24, 32))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (1, 4, 16, 18), (1, 4, 17, 16), (4, 16, 16)])
def test_a_wrong_shape_is_named(shape: tuple[int, ...]) -> None:
    for call in (small(), small().encode):
        with pytest.raises(ValueError, match=r"images must be 'b 4 h w' with sides that are multiples of 4, not of shape") as error:
            call(torch.zeros(shape))
        assert str(shape) in str(error.value)


# --- the bottleneck ---------------------------------------------------------------------------------------------------------------------------


def test_kl_closed_form() -> None:
    z_e = torch.randn(3, 8, 2, 2)
    mean, std = split(z_e)
    posterior = torch.distributions.Normal(mean, std)
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    _, loss, _ = KL(KLConfig(channels=4))(z_e)
    torch.testing.assert_close(loss, expected)


@given(st.floats(-4, 4), st.floats(-5, 3))
def test_kl_of_a_constant(mean: float, logvar: float) -> None:
    z_e = torch.cat([torch.full((1, 2, 1, 1), mean), torch.full((1, 2, 1, 1), logvar)], dim=1)
    loss = KL(KLConfig(channels=2))(z_e)[1].item()
    assert loss == pytest.approx(0.5 * (mean**2 + float(torch.tensor(logvar).exp()) - 1 - logvar), rel=1e-4, abs=1e-5)


def test_kl_is_zero_for_the_prior_only() -> None:
    kl = KL(KLConfig(channels=2))
    assert kl(torch.zeros(1, 4, 3, 3))[1] == 0
    assert kl(torch.full((1, 4, 3, 3), 0.3))[1] > 0


def test_a_sample_is_mean_plus_std_times_noise() -> None:
    z_e, noise = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    kl = KL(KLConfig(channels=4))
    mean, std = split(z_e)
    assert torch.equal(kl(z_e)[0], mean)
    torch.testing.assert_close(kl(z_e, noise)[0], mean + std * noise)


def test_extreme_log_variances_stay_finite() -> None:
    z_e = torch.cat([torch.zeros(1, 2, 1, 1), torch.tensor([-1e4, 1e4]).reshape(1, 2, 1, 1)], dim=1)
    assert torch.isfinite(KL(KLConfig(channels=2))(z_e)[1])


# --- standardisation --------------------------------------------------------------------------------------------------------------------------


def test_measured_latents_have_zero_mean_and_unit_std() -> None:
    codec, x = small(), pictures(12)
    measure_latents(codec, x.split(5))
    mean = codec.encode(x).mean
    assert mean.mean((0, 2, 3)).abs().max() < 1e-5
    assert (mean.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    assert codec.spec.mean == tuple(codec.latent_mean.tolist())
    assert codec.spec.std == tuple(codec.latent_std.tolist())


def test_statistics_do_not_depend_on_the_batches() -> None:
    one, many = small(), small()
    measure_latents(one, [pictures(12)])
    measure_latents(many, pictures(12).split(1))
    torch.testing.assert_close(one.latent_std, many.latent_std, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(one.latent_mean, many.latent_mean, rtol=1e-5, atol=1e-6)


def test_standardising_changes_nothing_that_is_decoded() -> None:
    codec, x, noise = small(), pictures(), torch.randn(6, 4, 4, 4)
    plain, sampled, spread = codec(x)[0], codec(x, noise)[0], split(codec.encoder(x))[1]
    measure_latents(codec, [x])
    torch.testing.assert_close(codec.decode(codec.encode(x).mean), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.decode(codec.encode(x, noise=noise).mean), sampled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(codec.encode(x).std * codec.latent_std[:, None, None], spread, rtol=1e-5, atol=1e-6)


def dead(channel: int = 2, scale: float = 0.0) -> tuple[Autoencoder, Tensor]:
    """A codec whose encoder says almost nothing in one channel: `scale` times what it would."""
    codec = small()
    out = codec.encoder[-1]
    with torch.no_grad():
        out.weight[channel] *= scale
        out.bias[channel] = 0.7
    x = pictures()
    measure_latents(codec, [x])
    return codec, x


@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_a_dead_channel_is_excluded(scale: float) -> None:
    codec, x = dead(scale=scale)
    assert codec.spec.std[2] == 0
    assert all(s > 0 for i, s in enumerate(codec.spec.std) if i != 2)
    latents = codec.encode(x, noise=torch.randn(6, 4, 4, 4))
    assert (latents.mean[:, 2] == 0).all()
    assert (latents.std[:, 2] == 0).all()
    assert (latents.mean[:, 1] != 0).any()


def test_decoding_ignores_a_dead_channel() -> None:
    codec, x = dead()
    z = codec.encode(x).mean
    loud = z.clone()
    loud[:, 2] = 100.0
    assert torch.equal(codec.decode(loud), codec.decode(z))
    torch.testing.assert_close(codec.decode(z), codec(x)[0], rtol=1e-5, atol=1e-6)
    loud = z.clone()
    loud[:, 1] += 1.0
    assert not torch.allclose(codec.decode(loud), codec.decode(z))


def test_a_quiet_but_living_channel_is_kept() -> None:
    codec, _ = dead(scale=0.5)
    assert codec.spec.std[2] > 0


def test_measuring_needs_something_to_measure() -> None:
    with pytest.raises(ValueError, match="at least two latent cells"):
        measure_latents(small(), [])


def test_statistics_travel_with_the_weights() -> None:
    codec, x = dead()
    again = small()
    again.load_state_dict(codec.state_dict())
    assert again.spec == codec.spec
    assert torch.equal(again.encode(x).mean, codec.encode(x).mean)


# --- learning ---------------------------------------------------------------------------------------------------------------------------------


def test_gradient_reaches_every_parameter_after_one_step() -> None:
    """The last convolution of each block starts at zero, so the first step reaches only that; the second reaches all."""
    codec, x = small(), pictures()
    optimiser = torch.optim.SGD(codec.parameters(), lr=0.1)
    for step in range(2):
        optimiser.zero_grad()
        y, kl, _ = codec(x, torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(step)))
        ((y - x).square().mean() + 1e-2 * kl).backward()
        silent = [name for name, p in codec.named_parameters() if p.grad is None or not p.grad.any()]
        assert not silent or step == 0, silent
        optimiser.step()
