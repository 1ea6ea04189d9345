import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.seams import Cond
from sfumato.diffusion.dit import DiT, DiTConfig
from sfumato.diffusion.guidance import along, apg, autoguidance, cfg, guided, inpaint, mixture, rescale, text_style
from sfumato.diffusion.path import PathConfig, make_path, timesteps
from sfumato.diffusion.precond import Precond, from_x0
from sfumato.diffusion.samplers import SAMPLERS, sample_heun
from sfumato.nn.conditions import concat_conds

f64 = torch.float64


class Net:
    """A Predict that depends on everything it is given; masked tokens and "none" count nothing. Keeps the batch size of each call."""

    def __init__(self) -> None:
        self.rows = []

    def __call__(self, x, t, cond):
        self.rows.append(len(x))
        out = torch.sin(x) * (1 + t)[:, None, None, None]
        if cond.text is not None:
            mask = torch.ones(cond.text.shape[:2]) if cond.mask is None else cond.mask
            out = out + (cond.text * mask[..., None]).sum((1, 2))[:, None, None, None] * x
        if cond.style is not None:
            out = out + cond.style.sum(1)[:, None, None, None] * x.square()
        if cond.label is not None:
            out = out + (cond.label + 1)[:, None, None, None]
        return out


def texts(n, b=2, masked=0):
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[:, n - masked :] = False
    return Cond(text=torch.randn(b, n, 3, dtype=f64), mask=mask)


@pytest.fixture
def x():
    return torch.randn(2, 1, 3, 3, dtype=f64, generator=torch.Generator().manual_seed(0))


T = torch.full((2,), 0.5, dtype=f64)


@pytest.mark.parametrize("post", ["none", "rescale", "apg"])
def test_scale_one_is_the_identity_in_one_call(x, rf, post):
    net, cond = Net(), texts(4)
    posts = {"none": [], "rescale": [rescale(0.7, "flow", rf)], "apg": [apg(0.0, 1.0)]}[post]
    got = guided(cfg(net, cond, Cond(), 1.0), posts)(x, T)
    assert net.rows == [2]
    assert torch.equal(got, net(x, T, cond))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("post", ["none", "rescale", "apg"])
def test_what_is_along_a_change_is_the_same_whatever_guidance_does(x, rf, post, scale):
    """Added to what is guided, at any scale; nothing of it where its weight is 0."""
    net, cond = Net(), texts(4)
    terms = cfg(net, cond, Cond(), scale)
    posts = {"none": [], "rescale": [rescale(0.7, "flow", rf)], "apg": [apg(0.0, 1.0)]}[post]
    change = lambda x, t, c: net(x, t, c) + 0.3 * x  # noqa: E731
    plain = guided(terms, posts)(x, T)
    assert torch.equal(guided(terms, [*posts, along(change, terms[0], lambda t: 2.0 if t < 0.4 else 0.0)])(x, T), plain)
    torch.testing.assert_close(guided(terms, [*posts, along(change, terms[0], 2.0)])(x, T), plain + 0.6 * x)


def test_scale_zero_is_the_unconditional_in_one_call(x):
    net = Net()
    got = guided(cfg(net, texts(4), Cond(), 0.0))(x, T)
    assert net.rows == [2]
    assert torch.equal(got, net(x, T, Cond()))


def test_cfg_formula_and_calls(x):
    net, cond, uncond = Net(), texts(4), texts(2)
    c, u = net(x, T, cond), net(x, T, uncond)
    for batched, rows in ((None, [4]), (True, [4]), (False, [2, 2])):
        net.rows.clear()
        got = guided(cfg(net, cond, uncond, 4.0), batched=batched)(x, T)
        assert net.rows == rows
        assert torch.allclose(got, u + 4 * (c - u))


def test_two_networks_are_two_calls(x):
    good, bad, cond = Net(), Net(), texts(3)
    guided([(good, cond, 2.0), (bad, cond, -1.0)])(x, T)
    assert (good.rows, bad.rows) == ([2], [2])
    good.rows.clear()
    guided([(good, cond, 2.0), (bad, cond, -0.5), (good, Cond(), -0.5)], batched=True)(x, T)
    assert (good.rows, bad.rows) == ([4], [2, 2])
    guided([(good, cond, 2.0), (bad, cond, -0.5), (good, Cond(), -0.5)])(x, T)
    assert good.rows == [4, 2, 2]


def test_autoguidance_leans_on_the_weaker_network_told_the_same(x):
    strong, weaker, cond, its = Net(), Net(), texts(4), texts(2)
    got = guided(autoguidance(strong, cond, weaker, its, 2.5))(x, T)
    a, b = Net()(x, T, cond), Net()(x, T, its)
    assert torch.allclose(got, b + 2.5 * (a - b), atol=1e-12)
    assert (strong.rows, weaker.rows) == ([2], [2])
    outside = guided(autoguidance(strong, cond, weaker, its, 2.5, (0.6, 1.0)))(x, T)
    assert torch.equal(outside, a)
    assert weaker.rows == [2], "outside of the interval it is not asked"


def test_a_term_of_weight_zero_is_not_evaluated(x):
    def never(x, t, cond):
        raise AssertionError("evaluated")

    net = Net()
    guided([(net, Cond(), 1.0), (never, Cond(), 0.0), (never, Cond(), lambda t: 0.0)])(x, T)
    assert net.rows == [2]


def test_an_interval_limits_guidance(x):
    net, cond = Net(), texts(4)
    denoise = guided(cfg(net, cond, Cond(), 3.0, interval=(0.2, 0.6)))
    for t, rows in ((0.1, [2]), (0.2, [4]), (0.6, [4]), (0.7, [2])):
        net.rows.clear()
        got = denoise(x, torch.full((2,), t, dtype=f64))
        assert net.rows == rows
        assert rows == [4] or torch.equal(got, net(x, torch.full((2,), t, dtype=f64), cond))


def test_text_style(x):
    net = Net()
    both, style, neither = Cond(text=texts(4).text, style=torch.rand(2, 3, dtype=f64)), Cond(style=torch.rand(2, 3, dtype=f64)), Cond()
    b, s, n = (net(x, T, c) for c in (both, style, neither))
    for text_scale, style_scale, rows in ((5.0, 2.0, [6]), (3.0, 3.0, [4]), (1.0, 1.0, [2]), (4.0, 1.0, [4])):
        net.rows.clear()
        got = guided(text_style(net, both, style, neither, text_scale, style_scale))(x, T)
        assert net.rows == rows
        assert torch.allclose(got, n + style_scale * (s - n) + text_scale * (b - s))
    varying = guided(text_style(net, both, style, neither, lambda t: 10 * t, 2.0))(x, T)
    assert torch.allclose(varying, n + 2 * (s - n) + 5 * (b - s))


def test_mixture(x):
    net, a, b = Net(), texts(4), texts(2)
    assert torch.allclose(guided(mixture(net, [a, b], [3, 1]))(x, T), 0.75 * net(x, T, a) + 0.25 * net(x, T, b))
    net.rows.clear()
    guided(mixture(net, [a, b], [0, 2]))(x, T)
    assert net.rows == [2]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.none() | st.integers(0, 5), min_size=2, max_size=4),
    masked=st.booleans(),
    style=st.lists(st.booleans(), min_size=4, max_size=4),
    label=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_batched_equals_unbatched(lengths, masked, style, label):
    x, net, terms = torch.randn(2, 1, 3, 3, dtype=f64), Net(), []
    for i, n in enumerate(lengths):
        text = None if n is None else torch.randn(2, n, 3, dtype=f64)
        mask = torch.rand(2, n) < 0.7 if masked and n is not None else None
        styles, labels = torch.rand(2, 5, dtype=f64) if style[i] else None, torch.tensor([3, 0]) if label[i] else None
        terms.append((net, Cond(text=text, mask=mask, style=styles, label=labels), 0.5 + i))
    together, apart = guided(terms, batched=True)(x, T), guided(terms, batched=False)(x, T)
    assert net.rows == [2 * len(terms)] + [2] * len(terms)
    assert torch.allclose(together, apart)


def test_batched_equals_unbatched_of_a_real_network(rf):
    """What concat_conds fills in is what the network itself takes for "none"."""
    torch.manual_seed(0)
    net = DiT(DiTConfig(channels=2, width=16, depth=2, heads=2, cross_every=1, text_width=3, styles=5, labels=4)).double()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    predict, x, said = Precond(net, "flow", rf), torch.randn(2, 2, 4, 4, dtype=f64), texts(4, masked=1)
    full = Cond(text=said.text, mask=said.mask, pooled=said.text[:, 0], style=torch.eye(5, dtype=f64)[:2], label=torch.tensor([1, 3]))
    shorter = Cond(text=said.text[:, :2], mask=said.mask[:, :2], pooled=said.text[:, 1])
    terms = [(predict, full, 3.0), (predict, shorter, -1.0), (predict, Cond(), -1.0)]
    apart = guided(terms, batched=False)(x, T)
    assert torch.allclose(guided(terms, batched=True)(x, T), apart, atol=1e-10)
    assert not torch.allclose(apart, predict(x, T, full), atol=1e-2)


def test_concat_conds_fills_in_what_none_means():
    a = Cond(text=torch.ones(2, 1, 3), pooled=torch.ones(2, 4), style=torch.ones(2, 5), label=torch.tensor([7, 8]), extra={"k": torch.ones(2)})
    b = Cond(text=torch.ones(2, 3, 3), concat=torch.ones(2, 1, 4, 4), extra={"k": torch.zeros(2)})
    c = concat_conds([a, b], 2)
    assert c.text.shape == (4, 3, 3)
    assert c.mask.tolist() == [[True, False, False]] * 2 + [[True] * 3] * 2
    assert c.label.tolist() == [7, 8, -1, -1]
    assert c.pooled.sum(1).tolist() == [4, 4, 0, 0]
    assert c.style.sum(1).tolist() == [5, 5, 0, 0]
    assert c.concat.sum((1, 2, 3)).tolist() == [0, 0, 16, 16]
    assert c.extra["k"].tolist() == [1, 1, 0, 0]
    empty = concat_conds([Cond(text=torch.ones(1, 2, 3)), Cond()], 1)
    assert empty.mask.tolist() == [[True, True], [True, False]]  # never an empty attention
    assert concat_conds([Cond(text=torch.ones(1, 2, 3))] * 2, 1).mask is None
    assert concat_conds([Cond(), Cond()], 3) == Cond()


def test_rescale_matches_the_std_of_the_networks_own_prediction(x, paths):
    net, cond, t = Net(), texts(4), torch.full((2,), 0.5, dtype=f64)
    for path, kind in ((paths["rf"], "flow"), (paths["vp-cosine"], "v"), (paths["vp-linear"], "eps")):

        def out(x0, kind=kind, path=path):
            return from_x0(kind, x0, x, t, path)

        terms = cfg(net, cond, Cond(), 5.0)
        plain, whole, half, none = (guided(terms, post)(x, t) for post in ([], *([rescale(phi, kind, path)] for phi in (1.0, 0.5, 0.0))))
        first = out(net(x, t, cond))
        assert torch.equal(none, plain)
        assert torch.allclose(out(whole).std(dim=(1, 2, 3)), first.std(dim=(1, 2, 3)))
        assert torch.allclose(out(half), (out(whole) + out(plain)) / 2)
        assert not torch.allclose(whole, plain)


def test_apg_projects_and_limits(x):
    net, cond, scale = Net(), texts(4), 5.0
    terms = cfg(net, cond, Cond(), scale)
    c, u = net(x, T, cond), net(x, T, Cond())
    plain = guided(terms)(x, T)
    assert torch.allclose(guided(terms, [apg(1.0)])(x, T), plain)
    push = guided(terms, [apg(0.0)])(x, T) - c
    assert torch.allclose((push * c).sum((1, 2, 3)), torch.zeros(2, dtype=f64), atol=1e-9)
    along = (plain - c - push).flatten(1)
    assert torch.allclose(torch.cosine_similarity(along, c.flatten(1)).abs(), torch.ones(2, dtype=f64))
    limited = guided(terms, [apg(1.0, norm_threshold=0.01)])(x, T) - c
    assert torch.allclose(limited.flatten(1).norm(dim=1), torch.full((2,), (scale - 1) * 0.01, dtype=f64))
    assert torch.allclose(torch.cosine_similarity(limited.flatten(1), (c - u).flatten(1)), torch.ones(2, dtype=f64))
    assert torch.allclose(guided(terms, [apg(1.0, norm_threshold=1e6)])(x, T), plain)


def test_the_last_post_is_outermost_and_sees_the_terms(x):
    net, seen = Net(), []

    def double(x0, x_t, t, parts):
        seen.extend(parts)
        return 2 * x0

    got = guided(cfg(net, texts(2), Cond(), 1.0), [double, lambda x0, x_t, t, parts: x0 + 1])(x, T)
    assert torch.allclose(got, 2 * seen[0][1] + 1)
    assert (seen[0][0], seen[1]) == (1.0, (0.0, None))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_network_calls_of_a_whole_run(x, rf, name, scale, calls_of):
    """Scale 1 makes one call of the plain batch an evaluation; guidance one of twice the batch."""
    net, info = Net(), SAMPLERS[name]
    for _ in info.function(guided(cfg(net, texts(4), Cond(), scale)), x, timesteps(rf, 6), rf, noise=lambda i: torch.zeros_like(x)):
        pass
    assert net.rows == [2 if scale == 1 else 4] * calls_of(name, 6, rf)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net, rf, x: guided([]), "at least one"),
        (lambda net, rf, x: guided([(net, Cond(), 0.0)])(x, T), "not all be 0"),
        (lambda net, rf, x: cfg(net, Cond(), Cond(), 2.0, interval=(0.5, 0.1)), "interval"),
        (lambda net, rf, x: mixture(net, [Cond()], [1.0, 2.0]), "one for each of the 1"),
        (lambda net, rf, x: mixture(net, [], []), "one at least"),
        (lambda net, rf, x: mixture(net, [Cond(), Cond()], [1.0, -2.0]), ">= 0"),
        (lambda net, rf, x: rescale(1.5, "flow", rf), "phi"),
        (lambda net, rf, x: rescale(0.5, "flw", rf), "did you mean 'flow'"),
        (lambda net, rf, x: apg(norm_threshold=-1.0), "norm_threshold"),
        (lambda net, rf, x: concat_conds([Cond(extra={"a": x}), Cond()], 2), "same names"),
        (lambda net, rf, x: concat_conds([Cond(pooled=x[:1]), Cond()], 2), "1 rows, but x_t has 2"),
    ],
)
def test_errors_name_the_value(x, rf, make, message):
    with pytest.raises(ValueError, match=message):
        make(Net(), rf, x)


def test_inpainting_ends_at_what_is_known_and_leaves_the_rest() -> None:
    """On the path of a Gaussian: outside of the mask the sampler's result is the known picture, inside it is as without."""
    path = make_path(PathConfig())
    known = torch.full((1, 1, 4, 4), 0.7)
    redraw = torch.zeros(1, 1, 4, 4)
    redraw[..., :2] = 1
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def predict(x_t: torch.Tensor, t: torch.Tensor, cond: Cond) -> torch.Tensor:
        return 0.3 * x_t

    ts = timesteps(path, 12)
    plain, filled = ([s.x for s in sample_heun(guided([(predict, Cond(), 1.0)], post), x, ts, path)][-1] for post in ((), [inpaint(known, redraw)]))
    torch.testing.assert_close(filled[..., 2:], known[..., 2:].expand(3, 1, 4, 2))
    torch.testing.assert_close(filled[..., :2], plain[..., :2])
