"""Every discrete bottleneck keeps the contract; each does what its paper says, beside an independent package where there is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from vector_quantize_pytorch import FSQ as TheirFSQ
from vector_quantize_pytorch import LFQ as TheirLFQ
from vector_quantize_pytorch import VectorQuantize

from sfumato.codecs.autoencoder import BOTTLENECKS, Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.fsq import FSQ, FSQConfig
from sfumato.codecs.bottlenecks.gumbel import Gumbel, GumbelConfig
from sfumato.codecs.bottlenecks.kl import KLConfig
from sfumato.codecs.bottlenecks.lfq import LFQ, LFQConfig
from sfumato.codecs.bottlenecks.residual import Residual, ResidualConfig
from sfumato.codecs.bottlenecks.vq import VQ, VQConfig, entropy_loss, k_means, rotated, use_of
from sfumato.codecs.convnets import ConvnetConfig
from sfumato.core.config import from_json, to_json

CASES: dict[str, Any] = {
    "vq": VQConfig(size=32, channels=6),
    "vq, straight through": VQConfig(size=32, channels=6, cosine=False, gradient="straight-through"),
    "vq, ema": VQConfig(size=32, channels=6, cosine=False, learn="ema"),
    "vq, entropy": VQConfig(size=32, channels=6, entropy=0.1),
    "fsq": FSQConfig(steps=(8, 5, 5)),
    "lfq": LFQConfig(channels=6),
    "residual": ResidualConfig(levels=3, code=VQConfig(size=16, channels=6, cosine=False, gradient="straight-through")),
}


def latents(config: Any, seed: int = 0, b: int = 4, side: int = 5) -> torch.Tensor:
    return torch.randn(b, config.encoder_channels, side, side, generator=torch.Generator().manual_seed(seed))


def made(config: Any) -> Any:
    torch.manual_seed(0)
    return BOTTLENECKS[type(config)](config)


@pytest.mark.parametrize("case", CASES)
def test_the_contract(case: str) -> None:
    config = CASES[case]
    bottleneck, z_e = made(config), latents(config).requires_grad_()
    z, loss, stats = bottleneck(z_e)
    indices = bottleneck.quantize(z_e.detach())
    assert torch.equal(stats["indices"], indices)
    assert indices.shape == (4, 5, 5, config.levels)
    torch.testing.assert_close(bottleneck.lookup(indices), z.detach(), rtol=0, atol=1e-6)
    again, same_loss, _ = bottleneck(z_e)
    assert torch.equal(again, z)
    assert torch.equal(loss, same_loss)
    assert loss.ndim == 0
    z.sum().backward()
    assert z_e.grad is not None
    assert float(z_e.grad.abs().min()) > 0, "the gradient reaches every latent"
    with pytest.raises(ValueError, match="must be from 0 to"):
        bottleneck.lookup(torch.full((1, 1, 1, config.levels), config.codebook_size))
    before = {k: v.clone() for k, v in bottleneck.state_dict().items()}
    bottleneck.eval()(z_e)
    assert all(torch.equal(v, before[k]) for k, v in bottleneck.state_dict().items()), "looking changes nothing"
    bottleneck.update(stats)
    assert int(bottleneck.counts.sum()) == indices.numel()
    bottleneck.forget()
    assert int(bottleneck.counts.sum()) == 0
    twin = made(config)
    twin.update(stats)
    twin.forget()
    assert all(torch.equal(v, bottleneck.state_dict()[k]) for k, v in twin.state_dict().items()), "an update is a function of its state"
    convnet = ConvnetConfig(image_channels=3, widths=(16,), encoder_blocks=(0,), decoder_blocks=(0,))
    whole = AutoencoderConfig(convnet=convnet, bottleneck=config)
    assert from_json(AutoencoderConfig, to_json(whole)) == whole
    spec = Autoencoder(whole).spec
    assert (spec.codebook_size, spec.levels, spec.latent_channels) == (config.codebook_size, config.levels, config.channels)


def test_a_codec_decodes_its_indices_and_its_standardised_codes_alike() -> None:
    torch.manual_seed(0)
    codec = Autoencoder(AutoencoderConfig(convnet=ConvnetConfig(image_channels=3, widths=(16,)  , encoder_blocks=(1,), decoder_blocks=(1,)), bottleneck=VQConfig(size=9, channels=4)))  # fmt: skip  # noqa: E501
    codec.latent_mean.uniform_()
    codec.latent_std.uniform_(0.5, 2)
    found = codec.encode(torch.rand(2, 3, 8, 8) * 2 - 1)
    assert found.indices is not None
    torch.testing.assert_close(codec.decode(found.mean), codec.decode_indices(found.indices), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="kl bottleneck has no indices"):
        Autoencoder(AutoencoderConfig(bottleneck=KLConfig())).decode_indices(found.indices)


# --- vq -----------------------------------------------------------------------------------------------------------------------------------------


def test_the_commitment_is_on_the_latent_and_the_rest_on_the_code() -> None:
    """d loss / d z = commitment * 2 (z - e) / n; d loss / d e = 2 (e - z) / n; turned round where legacy_beta says so."""
    for legacy in (False, True):
        bottleneck = VQ(VQConfig(size=2, channels=2, cosine=False, gradient="straight-through", commitment=0.25, legacy_beta=legacy))
        bottleneck.codebook.data = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
        z_e = torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1).requires_grad_()
        _, loss, _ = bottleneck(z_e)
        loss.backward()
        on_latent, on_code = (1.0, 0.25) if legacy else (0.25, 1.0)
        assert z_e.grad is not None
        torch.testing.assert_close(z_e.grad.flatten(), torch.full((2,), on_latent * 2 / 2))
        torch.testing.assert_close(bottleneck.codebook.grad, torch.tensor([[-on_code, -on_code], [0.0, 0.0]]))


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_chooses_as_the_package_does(cosine: bool) -> None:
    config = VQConfig(size=40, channels=8, cosine=cosine)
    ours = made(config)
    theirs = VectorQuantize(dim=8, codebook_size=40, use_cosine_sim=cosine, accept_image_fmap=True).eval()
    theirs._codebook.embed.data = torch.nn.functional.normalize(ours.codebook.data, dim=1)[None] if cosine else ours.codebook.data[None].clone()
    z_e = latents(config)
    _, index, _ = theirs(z_e)
    assert torch.equal(ours.quantize(z_e)[..., 0], index)


def test_the_rotation_turns_the_gradient() -> None:
    """At the chosen point the result is the code; the gradient is scaled and turned as the latent was onto it (angles are kept)."""
    g = torch.Generator().manual_seed(0)
    z, code, grad = (torch.randn(50, 6, generator=g) for _ in range(3))
    z.requires_grad_()
    out = rotated(z, code)
    torch.testing.assert_close(out, code, rtol=1e-4, atol=1e-5)
    out.backward(grad)
    cos = torch.nn.functional.cosine_similarity
    assert z.grad is not None
    torch.testing.assert_close(cos(z.grad, z.detach()), cos(grad, code), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(z.grad.norm(dim=1), grad.norm(dim=1) * code.norm(dim=1) / z.detach().norm(dim=1), rtol=1e-4, atol=1e-5)


def test_the_ema_codebook_is_the_mean_of_what_chose_it() -> None:
    bottleneck = VQ(VQConfig(size=4, channels=3, cosine=False, learn="ema", restart=0))
    assert not bottleneck.codebook.requires_grad
    centres = 4 * torch.eye(4, 3)
    z = (centres.repeat(25, 1) + 0.05 * torch.randn(100, 3, generator=torch.Generator().manual_seed(0))).T.reshape(1, 3, 10, 10)
    bottleneck.fit(z)
    for _ in range(900):
        bottleneck.update(bottleneck(z)[2])
    index = bottleneck.quantize(z).flatten()
    flat = z[0].flatten(1).T
    for k in range(4):
        torch.testing.assert_close(bottleneck.codebook[k], flat[index == k].mean(0), rtol=1e-3, atol=1e-3)


def test_dead_codes_begin_again_from_latents_and_living_ones_stay() -> None:
    config = VQConfig(size=64, channels=4, cosine=False, restart=2.0)
    bottleneck = made(config)
    bottleneck.codebook.data[8:] += 100
    z_e = latents(config, b=8, side=4)
    before = bottleneck.codebook.data.clone()
    used = bottleneck(z_e)[2]["indices"].unique()
    bottleneck.update(bottleneck(z_e)[2])
    assert len(used) <= 8
    assert torch.equal(bottleneck.codebook.data[used], before[used])
    assert float(bottleneck.codebook.abs().max()) < 10, "all that were far away lie among the latents now"
    assert use_of(bottleneck(z_e)[2]["indices"].flatten().bincount(minlength=64))["usage"] > 0.9
    still = VQ(VQConfig(size=64, channels=4, cosine=False, restart=0))
    still.codebook.data = before.clone()
    for _ in range(10):
        still.update(still(z_e)[2])
    assert torch.equal(still.codebook.data, before)


def test_k_means_finds_the_clusters_and_uses_every_code() -> None:
    g = torch.Generator().manual_seed(0)
    centres = 5 * torch.randn(12, 6, generator=g)
    z = centres.repeat_interleave(30, 0) + 0.1 * torch.randn(360, 6, generator=g)
    found = k_means(z, 12)
    apart = torch.cdist(centres, found)
    assert float(apart.amin(1).max()) < 0.2
    assert len(k_means(z, 200).unique(dim=0)) == 200
    assert k_means(z[:5], 20).shape == (20, 6), "fewer latents than codes"
    bottleneck = made(VQConfig(size=12, channels=6))
    bottleneck.fit(z.T.reshape(1, 6, 20, 18))
    torch.testing.assert_close(bottleneck.codes.norm(dim=1), torch.full((12,), math.sqrt(6)))


def test_usage_is_counted_over_what_was_seen() -> None:
    even = use_of(torch.full((8,), 5))
    assert even == pytest.approx({"usage": 1.0, "perplexity": 8.0, "perplexity_share": 1.0})
    one = use_of(torch.tensor([7, 0, 0, 0]))
    assert one == pytest.approx({"usage": 0.25, "perplexity": 1.0, "perplexity_share": 0.25})
    assert use_of(torch.zeros(4, dtype=torch.int64))["perplexity"] == 0


def test_the_entropy_term_is_lowest_for_sure_and_even_choices() -> None:
    codes = 6 * torch.eye(4)
    even, one, unsure = codes.repeat(8, 1), codes[:1].repeat(32, 1), torch.zeros(32, 4)
    values = [float(entropy_loss(z, codes)) for z in (even, one, unsure)]
    assert values == pytest.approx([-1.0, 0.0, 0.0], abs=1e-3)


# --- fsq, lfq, residual, gumbel -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(8, 5, 5, 5), (4, 4, 4), (3, 7)])
def test_fsq_is_that_of_the_package(steps: tuple[int, ...]) -> None:
    z_e = 3 * latents(FSQConfig(steps=steps))
    theirs = TheirFSQ(list(steps))
    values, index = theirs(z_e)
    ours = FSQ(FSQConfig(steps=steps))
    assert torch.equal(ours.quantize(z_e)[..., 0], index.long())
    torch.testing.assert_close(ours(z_e)[0], values, rtol=0, atol=1e-6)
    every = torch.arange(math.prod(steps)).reshape(1, 1, -1, 1)
    assert len(ours.lookup(every).flatten(2)[0].T.unique(dim=0)) == math.prod(steps)
    with pytest.raises(ValueError, match=r"steps \(=\[8, 1, 5\]\) must all be at least 3"):
        FSQConfig(steps=(8, 1, 5))


def test_lfq_is_that_of_the_package() -> None:
    config = LFQConfig(channels=6, entropy=0.0)
    z_e = latents(config)
    theirs = TheirLFQ(dim=6, codebook_size=64).eval()
    values, _, _ = theirs(z_e)
    ours = LFQ(config)
    assert torch.equal(ours(z_e)[0], values)
    assert torch.equal(ours.lookup(ours.quantize(z_e)), values)


def test_lfqs_entropy_is_exact_within_a_group() -> None:
    config = LFQConfig(channels=4, entropy=1.0, commitment=0.0)
    z_e = latents(config)
    z = z_e.movedim(1, -1).flatten(0, 2)
    codes = torch.tensor([[1.0 if i >> j & 1 else -1.0 for j in range(4)] for i in range(16)])
    p = (-(torch.cdist(z, codes) ** 2)).softmax(1)
    mean = p.mean(0)
    expected = (-(p * p.log()).sum(1).mean() + (mean * mean.log()).sum()) / (4 * math.log(2))
    torch.testing.assert_close(LFQ(config)(z_e)[1], expected, rtol=1e-4, atol=1e-5)


def test_each_level_of_a_residual_comes_nearer() -> None:
    config = ResidualConfig(levels=4, code=VQConfig(size=16, channels=4, cosine=False, gradient="straight-through"))
    bottleneck = Residual(config)
    z_e = latents(config, b=8, side=8)
    bottleneck.fit(z_e)
    indices = bottleneck.quantize(z_e)
    errors = [float((bottleneck.lookup(indices[..., :n]) - z_e).square().mean()) for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3
    with pytest.raises(ValueError, match=r"code\.cosine must be false"):
        ResidualConfig(code=VQConfig())


def test_gumbel_is_used_and_not_trained() -> None:
    config = GumbelConfig(size=8, channels=3, encoder_channels=5)
    bottleneck = Gumbel(config)
    with pytest.raises(ValueError, match="can be used, not trained"):
        bottleneck(latents(config))
    bottleneck.requires_grad_(False)
    z, _, stats = bottleneck(latents(config))
    torch.testing.assert_close(bottleneck.lookup(stats["indices"]), z)
