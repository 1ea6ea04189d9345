"""Generators and discriminators: shapes, what they hear, spectral norms, modulation, and augmentations that change both kinds of pictures alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from sfumato.core.config import from_json, to_json
from sfumato.core.seams import Cond
from sfumato.gans.augment import _move, _scale, _tinted, _turn, ada, diffaugment
from sfumato.gans.dcgan import DCGANConfig
from sfumato.gans.pair import RARE, RAREST, Colours, Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, NetworkConfig
from sfumato.gans.r3gan import GroupedBlock, R3GANConfig
from sfumato.gans.residual import ResidualConfig
from sfumato.gans.style import StyleConfig, Styled, spread_of

NETWORKS: list[NetworkConfig] = [
    DCGANConfig(width=16, most=32),
    ResidualConfig(width=16, most=32),
    R3GANConfig(width=16, most=32),
    R3GANConfig(width=16, most=32, patch=1),
    StyleConfig(width=16, most=32, w=24),
]


def pair(network: NetworkConfig, size: int = 16, channels: int = 3, spectral: bool = False, **told: int) -> tuple[Generator, Discriminator]:
    torch.manual_seed(0)
    made = {"network": network, "size": size, "image_channels": channels, "told": 8} | told
    return Generator(GeneratorConfig(z=12, **made)).eval(), Discriminator(DiscriminatorConfig(spectral=spectral, **made)).eval()  # type: ignore[arg-type]


def said(count: int) -> Cond:
    g = torch.Generator().manual_seed(1)
    style = torch.eye(3)[torch.arange(count) % 3]
    return Cond(text=torch.zeros(count, 1, 5), pooled=torch.randn(count, 5, generator=g), style=style, label=torch.arange(count) % 4)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.kind)
@pytest.mark.parametrize(("size", "channels"), [(8, 3), (32, 4)])
def test_a_pair_fits_together(network: NetworkConfig, size: int, channels: int) -> None:
    generator, discriminator = pair(network, size, channels)
    x = generator(torch.randn(5, 12), Cond())
    assert x.shape == (5, channels, size, size)
    assert 0.01 < float(x.detach().std()) < 3, "neither nothing nor too much at the start"
    scores = discriminator(x, Cond())
    assert scores.shape == (5,)
    scores.sum().backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    used = {n for n, p in generator.named_parameters() if p.grad is not None}
    assert used == {n for n, _ in generator.named_parameters()}


def test_colours_hang_together_as_those_of_pictures() -> None:
    """What is mixed of independent channels has the correlations that were learned, and the deviations that it had. Where no colour is lacking
    nothing is mixed."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.5, -0.2, 0.05]])
    noise = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    x = torch.einsum("ij,bjhw->bihw", root, noise) * torch.tensor([0.5, 2.0, 1.0])[:, None, None] + 0.3
    colours = Colours(3)
    torch.testing.assert_close(colours(x), x)
    colours.learn(x)
    wanted = torch.corrcoef(x.transpose(0, 1).flatten(1))
    torch.testing.assert_close(colours.mix @ colours.mix.T, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(colours.mix, colours.mix.T)
    assert float(torch.linalg.eigvalsh(wanted)[0]) < RARE
    full = Colours(3)
    full.learn(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(full.mix, torch.eye(3))


def test_what_no_picture_has_is_rare_and_not_impossible() -> None:
    grey = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    colours = Colours(4)
    colours.learn(torch.cat([grey.expand(-1, 3, -1, -1), torch.ones_like(grey)], dim=1))  # alpha tells nothing
    torch.testing.assert_close(colours.mix[3], torch.tensor([0.0, 0.0, 0.0, 1.0]))
    of_grey = torch.linalg.eigvalsh(colours.mix[:3, :3])
    torch.testing.assert_close(of_grey, torch.tensor([RAREST, RAREST, 3**0.5]), atol=1e-5, rtol=1e-3)
    drawn = colours(torch.randn(2, 4, 16, 16))
    assert float((drawn[:, 0] - drawn[:, 1]).std()) < 2 * RAREST
    assert 0.9 < float(drawn[:, :3].std()) < 1.1


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.kind)
def test_every_pair_can_have_colours_of_its_pictures(network: NetworkConfig) -> None:
    config = GeneratorConfig(z=12, network=network, size=16, colours=True)
    plain, other = Generator(replace(config, colours=False)).eval(), Generator(config).eval()
    assert set(other.state_dict()) - set(plain.state_dict()) == {"network.colours.mix"}
    other.load_state_dict(plain.state_dict() | {"network.colours.mix": torch.eye(3)})
    z = torch.randn(5, 12)
    torch.testing.assert_close(other(z, Cond()), plain(z, Cond()))
    other.network.colours.mix.fill_(1 / 3)  # type: ignore[union-attr, operator]
    x = other(z, Cond())
    torch.testing.assert_close(x[:, 0], x[:, 2])
    assert float(x.detach().std()) > 0


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.kind)
def test_both_hear_what_is_said(network: NetworkConfig) -> None:
    generator, discriminator = pair(network, text_width=5, styles=3, labels=4)
    z, cond = torch.randn(4, 12, generator=torch.Generator().manual_seed(2)), said(4)
    x = generator(z, cond)
    scores = discriminator(x, cond)
    for change in ({"pooled": cond.pooled + 1}, {"style": cond.style.flip(1)}, {"label": (cond.label + 1) % 4}):  # type: ignore[operator, union-attr]
        other = replace(cond, **change)
        assert not torch.equal(generator(z, other), x), change
        assert not torch.equal(discriminator(x, other), scores), change
    assert generator(z, Cond()).shape == x.shape, "nothing said at all"


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.kind)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_said_is_compared_by_projection(network: NetworkConfig, share: float) -> None:
    """score = psi(phi) + share <V y, phi> / sqrt(d) (arXiv 1802.05637, eq. 3)."""
    _, net = pair(network, labels=4)
    x, cond = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3)), Cond(label=torch.tensor([0, 1, 2, -1]))
    net.told.share.fill_(share)  # type: ignore[union-attr]
    phi = net.network(x)
    y = net.told.label.weight[[0, 1, 2, 4]]  # type: ignore[union-attr]
    scale = getattr(net.project, "scale", 1.0)
    expected = net.score(phi)[:, 0] + share * (scale * (y @ net.project.weight.T) * phi).sum(1) / phi.shape[1] ** 0.5  # type: ignore[union-attr, operator]
    torch.testing.assert_close(net(x, cond), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.kind)
def test_any_discriminator_can_be_bounded(network: NetworkConfig) -> None:
    torch.manual_seed(0)
    _, discriminator = pair(replace(network, norm="none") if network.kind == "dcgan" else network, spectral=True, labels=4)  # type: ignore[arg-type]
    discriminator.train()
    x = torch.randn(4, 3, 16, 16)
    for _ in range(30):
        discriminator(x, said(4))
    layers = [m for m in discriminator.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Embedding))]
    assert layers
    for m in layers:
        assert float(torch.linalg.matrix_norm(m.weight.flatten(1), 2)) == pytest.approx(1, rel=0.1)
        assert getattr(m, "scale", 1.0) == 1.0
    one, other = (discriminator.eval()(x, Cond(label=torch.full((4,), i))) for i in (0, 1))
    assert float((one - other).abs().mean()) > 0.08 * float(one.abs().mean()), "what is said still counts"


def test_configs_go_through_json() -> None:
    for network in NETWORKS:
        plain = replace(network, norm="none") if network.kind == "dcgan" else network  # type: ignore[arg-type]
        for config in (GeneratorConfig(network=network, labels=3), DiscriminatorConfig(network=plain, spectral=True)):
            assert from_json(type(config), to_json(config)) == config
    with pytest.raises(ValueError, match=r"size \(=48\) must be a power of two"):
        GeneratorConfig(size=48)
    with pytest.raises(ValueError, match=r"discriminator.network.norm \(='group'\) undoes what spectral bounds: set it to none"):
        DiscriminatorConfig(network=DCGANConfig(norm="group"), spectral=True)
    with pytest.raises(ValueError, match=r"width x wider \(=20\) must be a multiple of group"):
        R3GANConfig(width=10)
    for wrong in (
        lambda: R3GANConfig(group=0), lambda: R3GANConfig(blocks=0), lambda: DCGANConfig(width=0), lambda: ResidualConfig(most=-1),
        lambda: StyleConfig(mapping=0), lambda: StyleConfig(mapping_lr=float("nan")), lambda: GeneratorConfig(z=0), lambda: GeneratorConfig(told=0),
        lambda: DiscriminatorConfig(labels=-1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"\(=.+\) must be at least"):
            wrong()


# --- the parts of networks ------------------------------------------------------------------------------------------------------------------------


def test_demodulation_is_that_of_the_weights() -> None:
    """Scaling what enters and what leaves a convolution is the same as scaling its weights for each picture (arXiv 1912.04958, eq. 1 and 3)."""
    torch.manual_seed(0)
    layer = Styled(6, 5, 7)
    x, w = torch.randn(3, 6, 8, 8), torch.randn(3, 7)
    noise = torch.randn(3, 1, 8, 8)
    torch.nn.init.constant_(layer.strength, 0.3)
    ours = layer(x, w, noise)
    s = layer.style(w)
    for i in range(3):
        weight = layer.conv.weight * layer.conv.scale * s[i][None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        theirs = F.leaky_relu(F.conv2d(x[i : i + 1], weight, padding=1) + 0.3 * noise[i], 0.2) * 2**0.5
        torch.testing.assert_close(ours[i : i + 1], theirs, rtol=1e-4, atol=1e-5)


def test_noise_and_style_of_a_style_network() -> None:
    generator, _ = pair(StyleConfig(width=16, most=32, w=24))
    z = torch.randn(2, 12)
    for layer in generator.network.layers:  # type: ignore[union-attr]
        torch.nn.init.constant_(layer.strength, 0.5)
    assert generator.noises == 16 + 2 * 64 + 2 * 256
    noise = torch.randn(2, generator.noises)
    assert not torch.equal(generator(z, Cond(), noise), generator(z, Cond()))
    w = generator.style(z, Cond())
    assert w.shape == (2, 24)
    assert torch.equal(generator.draw(w, noise), generator(z, Cond(), noise))
    torch.testing.assert_close(generator.style(3 * z, Cond()), w), "only the direction of z counts"


def test_a_new_residual_block_is_the_identity() -> None:
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(GroupedBlock(32, R3GANConfig(), 8)(x), x)


def test_the_spread_of_a_group_by_hand() -> None:
    x = torch.zeros(4, 2, 3, 3)
    x[0] = 4.0
    assert torch.allclose(spread_of(x), torch.full((4, 1, 3, 3), 3**0.5), atol=1e-4)
    assert spread_of(torch.zeros(6, 2, 3, 3)).shape == (6, 1, 3, 3)
    assert float(spread_of(torch.ones(4, 2, 3, 3)).max()) < 1e-3


# --- augmentation ---------------------------------------------------------------------------------------------------------------------------------


def test_without_probability_nothing_changes() -> None:
    x = torch.randn(4, 3, 16, 16)
    assert torch.equal(ada(x, 0.0), x)
    assert torch.equal(ada(x, torch.zeros(())), x)


@pytest.mark.parametrize("change", [diffaugment, lambda x: ada(x, 0.8)], ids=["diffaugment", "ada"])
def test_changes_are_differentiable_and_drawn_anew(change: object) -> None:
    x = torch.rand(16, 4, 16, 16, requires_grad=True)
    torch.manual_seed(3)
    a, again = change(x), change(x)  # type: ignore[operator]
    torch.manual_seed(3)
    assert torch.equal(change(x), a)  # type: ignore[operator]
    assert not torch.equal(a, again)
    (gradient,) = torch.autograd.grad(a.square().sum(), x)
    assert int((gradient.flatten(1).abs().sum(1) > 0).sum()) == 16
    assert torch.isfinite(a).all()


def test_a_shift_and_a_hole_lose_what_they_should() -> None:
    x = torch.ones(256, 1, 32, 32).expand(-1, 4, -1, -1)
    torch.manual_seed(0)
    alpha = diffaugment(x)[:, 3]  # which no colour changes
    share = float((alpha == 1).float().mean())
    kept = 1 - 0.25 * 0.73  # of a hole of a quarter of the picture, whose middle may be at the edge
    assert share == pytest.approx(kept * (1 - 2 / 32) ** 2, abs=0.05)
    assert set(alpha.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (_scale(-torch.ones(1), torch.ones(1)), lambda x: x.flip(3)),
        (_turn(torch.full((1,), math.pi / 2)), lambda x: x.rot90(1, (2, 3))),
        (_turn(torch.full((1,), math.pi)), lambda x: x.flip(2, 3)),
        (_move(torch.full((1,), 2 / 8 * 3), torch.zeros(1)), lambda x: torch.cat([x[..., 3:], x.flip(3)[..., :3]], dim=3)),
    ],
    ids=["mirrored", "a quarter turn", "half a turn", "shifted by three, reflected at the edge"],
)
def test_ada_places_pixels_exactly(matrix: torch.Tensor, expected: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("sfumato.gans.augment._placed", lambda *_: matrix)
    monkeypatch.setattr("sfumato.gans.augment._tinted", lambda *_: (torch.eye(3)[None], torch.zeros(1, 3)))
    torch.testing.assert_close(ada(x, 1.0), expected(x), rtol=0, atol=1e-5)


def test_ada_turns_colours_about_the_greys() -> None:
    """Whatever is drawn by chance: grey stays grey, and without contrast and brightness the sum of the colours stays."""
    torch.manual_seed(0)
    turn, _ = _tinted(torch.zeros(400, 3, 2, 2), 1.0)
    grey = turn @ torch.ones(400, 3, 1)
    torch.testing.assert_close(grey, grey[:, :1].expand(-1, 3, -1), rtol=0, atol=1e-4)
    assert float(turn.std(0).min()) > 0.1, "every channel has a part in it"


def test_ada_changes_as_many_as_it_should() -> None:
    x = torch.rand(1500, 3, 64, 64)
    torch.manual_seed(0)
    same = (ada(x, 0.1) == x).flatten(1).all(1).float().mean()
    # mirroring half of the time, a quarter turn three times of four, a shift, size, two rotations together, width, a movement;
    # of colours brightness, contrast, mirrored brightness half of the time, hue, saturation
    untouched = (1 - 0.05) * (1 - 0.075) * 0.9 * 0.9 * 0.9 * 0.9 * 0.9 * (0.9 * 0.9 * 0.95 * 0.9 * 0.9)
    assert float(same) == pytest.approx(untouched, abs=0.035)
