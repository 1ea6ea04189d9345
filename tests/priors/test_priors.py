"""Priors over codes, on distributions that are known: entropies, samples by chi-square, caches, and what a mask keeps."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from sfumato.core.seams import Cond
from sfumato.priors.choose import chosen, limited, race_of, weighted
from sfumato.priors.frequency import counted
from sfumato.priors.gpt import cached, gpt_loss, sample_gpt, uncached
from sfumato.priors.maskgit import drawn_mask, left_masked, maskgit_loss, sample_maskgit
from sfumato.priors.tokens import Vocabulary, factorised
from sfumato.priors.transformer import MASKED, Prior, PriorConfig

SQUARE = Vocabulary(codes=4, grid=(2, 2))
SMALL = PriorConfig(vocabulary=SQUARE, width=32, depth=2, heads=2, dropout=0.0, text_width=0, styles=0)
STATES = torch.tensor(list(itertools.product(range(4), repeat=4)))


def correlated() -> Tensor:
    """The probability of each of the 256 pictures of 4 codes on a 2 x 2 grid: neighbours like to be equal, the diagonal likes to differ."""
    a, b, c, d = STATES.T
    energy = 1.5 * ((a == b).float() + (c == d).float()) - 1.0 * (a == d).float() + 0.7 * (b == c).float() + 0.3 * a.float() - 0.4 * (d == 2).float()
    return energy.softmax(0)


P = correlated()
ENTROPY = float(-(P * P.log()).sum())


USUAL_BIAS = ((1, 0.44, -1.16), (2, 0.14, -0.31), (3, 0.07, -0.11), (10, 0.08, 0.21))  # steps (10 are 4: one a token), distance, nats likelier


def drawn(count: int, seed: int) -> Tensor:
    return STATES[torch.multinomial(P, count, replacement=True, generator=torch.Generator().manual_seed(seed))]


def trained(network: Prior, steps: int) -> Prior:
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: min(1, (i + 1) / 50) * (1 - i / steps))
    for i in range(steps):
        x = drawn(256, i)
        if network.config.way == "gpt":
            loss, _ = gpt_loss(network, x, Cond())
        else:
            rng = np.random.default_rng(i)
            loss, _ = maskgit_loss(network, x, torch.from_numpy(np.stack([drawn_mask(rng, 4) for _ in range(256)])), Cond())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def gpt() -> Prior:
    torch.manual_seed(0)
    return trained(Prior(SMALL), 500)


@pytest.fixture(scope="module")
def maskgit() -> Prior:
    torch.manual_seed(0)
    return trained(Prior(replace(SMALL, way="maskgit")), 1200)


def races(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.empty(shape).exponential_(generator=g) for _ in range(4)]


def fits(samples: Tensor) -> float:
    """The p-value that samples are of P; pictures that are expected less than five times are taken together."""
    counts = torch.bincount((samples * torch.tensor([64, 16, 4, 1])).sum(1), minlength=256).double()
    expected = P.double() / P.double().sum() * len(samples)
    rare = expected < 5
    seen = [*counts[~rare].tolist(), *([float(counts[rare].sum())] if rare.any() else [])]
    wanted = [*expected[~rare].tolist(), *([float(expected[rare].sum())] if rare.any() else [])]
    return float(chisquare(seen, wanted).pvalue)


# --- known distributions ------------------------------------------------------------------------------------------------------------------------


def test_a_gpt_reaches_the_entropy(gpt: Prior) -> None:
    with torch.no_grad():
        logits = gpt(STATES, Cond())
    log_p = logits.log_softmax(-1).gather(-1, STATES[..., None]).sum((1, 2))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-4), "a distribution over whole pictures"
    assert float(-(P * log_p).sum()) == pytest.approx(ENTROPY, rel=0.01)


def test_samples_of_a_gpt_are_of_the_distribution(gpt: Prior) -> None:
    n = 8192
    for step in (cached(gpt, [(Cond(), 1.0)], n), uncached(gpt, [(Cond(), 1.0)], n)):
        noise = races((n, 4), 1)
        samples = list(sample_gpt(step, 4, lambda i, r=noise: r[i]))[-1]
        assert fits(samples) > 0.001
    assert fits(torch.randint(0, 4, (n, 4), generator=torch.Generator().manual_seed(0))) < 1e-9, "the test can fail"


def exact_masked_entropy() -> float:
    """The mean of -log p(x_i | what is not masked) of a masked token, under the schedule that training draws."""
    total = weight = 0.0
    of_count = {1: 0.0, 2: 0.0, 3: 0.0, 4: 0.0}
    for u in (np.arange(100_000) + 0.5) / 100_000:
        of_count[max(1, math.ceil(math.cos(math.pi / 2 * u) * 4))] += 1e-5
    for count, share in of_count.items():
        for masked in itertools.combinations(range(4), count):
            rest = [i for i in range(4) if i not in masked]
            of_rest: dict[tuple[int, ...], Tensor] = {}
            each = share / math.comb(4, count)
            for i in masked:
                joint = torch.zeros(4 ** len(rest), 4)
                at = sum((STATES[:, r] * 4**j for j, r in enumerate(rest)), torch.zeros(256, dtype=torch.int64))
                joint.index_put_((at, STATES[:, i]), P, accumulate=True)
                conditional = joint / joint.sum(1, keepdim=True)
                total += each * float(-(joint * conditional.clamp_min(1e-30).log()).sum())
            weight += each * count
            del of_rest
    return total / weight


def test_maskgit_reaches_the_masked_entropy(maskgit: Prior) -> None:
    rng, losses, counts = np.random.default_rng(7), 0.0, 0
    x = drawn(65_536, 99)
    mask = torch.from_numpy(np.stack([drawn_mask(rng, 4) for _ in range(len(x))]))
    with torch.no_grad():
        for a, m in zip(x.split(8192), mask.split(8192), strict=True):
            losses += float(maskgit_loss(maskgit, a, m, Cond())[0]) * int(m.sum())
            counts += int(m.sum())
    assert losses / counts == pytest.approx(exact_masked_entropy(), rel=0.01)


def sampled(network: torch.nn.Module, count: int, seed: int = 3, **options: object) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    race = lambda _: torch.empty(count, 4, 4).exponential_(generator=g)  # noqa: E731
    sway = lambda _: torch.empty(count, 4).exponential_(generator=g)  # noqa: E731
    return list(sample_maskgit(network, [(Cond(), 1.0)], torch.full((count, 4), MASKED), race, sway, **options))[-1]  # type: ignore[arg-type]


def test_one_token_a_step_in_random_order_is_exact(maskgit: Prior) -> None:
    assert fits(sampled(maskgit, 2048, steps=4, order="random")) > 0.001


class Exact(torch.nn.Module):
    """The logarithm of what each masked token can be, given those that are known: a MaskGIT that has nothing left to learn."""

    def forward(self, tokens: Tensor, cond: Cond) -> Tensor:
        possible = ((tokens[:, None] == STATES) | (tokens[:, None] == MASKED)).all(-1) * P
        return (possible @ torch.nn.functional.one_hot(STATES, 4).float().flatten(1)).view(-1, 4, 4).log()


def bias(**options: object) -> tuple[float, float]:
    """(total variation distance, how much likelier than it should be a picture is, in nats) of what the exact network draws."""
    samples = torch.cat([sampled(Exact(), 8192, seed, **options) for seed in range(8)])  # type: ignore[arg-type]
    at = (samples * torch.tensor([64, 16, 4, 1])).sum(1)
    share = torch.bincount(at, minlength=256) / len(at)
    return float((share - P).abs().sum() / 2), float(P.log()[at].mean()) + ENTROPY


def test_how_biased_the_schedules_are(maskgit: Prior) -> None:
    """The figures of the docs: several tokens of one step are drawn as if they did not know each other, and the surest are kept.

    A network that knows the distribution shows what the schedule alone does; 65,536 pictures by chance are 0.02 away.
    """
    distance, likelier = bias(steps=4, order="random")
    assert distance < 0.025
    assert abs(likelier) < 0.02
    for steps, away, more in USUAL_BIAS:
        distance, likelier = bias(steps=steps)
        assert distance == pytest.approx(away, abs=0.02), steps
        assert likelier == pytest.approx(more, abs=0.05), steps
    assert fits(sampled(maskgit, 8192, steps=2)) < 1e-6, "and one that has learned it does the same"


# --- caches and companies -----------------------------------------------------------------------------------------------------------------------


def told(count: int, width: int, styles: int, labels: int) -> Cond:
    g = torch.Generator().manual_seed(5)
    mask = torch.ones(count, 5, dtype=torch.bool)
    mask[::2, 3:] = False
    style = torch.eye(styles)[torch.arange(count) % styles] if styles else None
    return Cond(
        text=torch.randn(count, 5, width, generator=g), mask=mask, pooled=torch.randn(count, width, generator=g), style=style,
        label=torch.arange(count) % labels if labels else None,
    )  # fmt: skip


RICH = PriorConfig(vocabulary=Vocabulary(codes=32, levels=2, grid=(3, 2), digits=(4, 8)), width=32, depth=3, heads=2, dropout=0.0, text_width=12,
                   styles=3, labels=4, memory=5)  # fmt: skip
KINDS = [RICH, replace(RICH, condition="prefix"), replace(RICH, positions="learned"), replace(RICH, condition="prefix", positions="learned")]


@pytest.mark.parametrize("config", KINDS)
def test_cached_decoding_is_uncached_decoding(config: PriorConfig) -> None:
    torch.manual_seed(1)
    network = Prior(config).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim > 1 else None
    cond, other = told(3, 12, 3, 4), told(3, 12, 3, 4)
    terms = [(cond, 2.5), (replace(other, pooled=other.pooled * 0, label=torch.full((3,), -1)), -1.5)]  # type: ignore[operator]
    tokens = torch.stack([torch.randint(0, (4, 8)[i % 2], (3,)) for i in range(config.vocabulary.length)], 1)
    with torch.no_grad():
        fast, slow = cached(network, terms, 3), uncached(network, terms, 3)
        for i in range(config.vocabulary.length):
            a, b = (f(tokens[:, i - 1] if i else None, i) for f in (fast, slow))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", KINDS)
def test_a_gpt_does_not_see_what_comes(config: PriorConfig) -> None:
    torch.manual_seed(1)
    network = Prior(config).eval()
    n = config.vocabulary.length
    tokens = torch.zeros(1, n, dtype=torch.int64)
    other = tokens.clone()
    other[:, 7:] = 1
    cond = told(1, 12, 3, 4)
    with torch.no_grad():
        a, b = network(tokens, cond), network(other, cond)
    assert torch.equal(a[:, :8], b[:, :8])
    assert not torch.equal(a[:, 8:], b[:, 8:])


@pytest.mark.parametrize("way", ["gpt", "maskgit"])
@pytest.mark.parametrize("condition", ["cross", "prefix"])
def test_every_condition_is_heard_and_padding_is_not(way: str, condition: str) -> None:
    torch.manual_seed(0)
    network = Prior(replace(RICH, way=way, condition=condition)).eval()  # type: ignore[arg-type]
    tokens = torch.zeros(2, network.config.vocabulary.length, dtype=torch.int64)
    cond = told(2, 12, 3, 4)
    with torch.no_grad():
        base = network(tokens, cond)
        assert cond.text is not None
        assert cond.mask is not None
        assert cond.pooled is not None
        padded = replace(cond, text=torch.where(cond.mask[..., None], cond.text, 99.0))
        assert torch.equal(network(tokens, padded), base)
        for change in ({"text": cond.text + 1}, {"pooled": cond.pooled + 1}, {"style": cond.style.flip(1)}, {"label": cond.label + 1}):  # type: ignore[union-attr, operator]
            assert not torch.equal(network(tokens, replace(cond, **change)), base), change
        assert network(tokens, Cond()).shape == base.shape, "nothing said at all"


@pytest.mark.parametrize("way", ["gpt", "maskgit"])
def test_alone_or_in_company_the_codes_are_the_same(way: str) -> None:
    torch.manual_seed(0)
    network = Prior(replace(RICH, way=way, depth=2, vocabulary=Vocabulary(codes=64, grid=(2, 3)))).eval()  # type: ignore[arg-type]
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    cond, n = told(256, 12, 3, 4), 6
    noise = torch.empty(n, 256, n, 64).exponential_(generator=torch.Generator().manual_seed(0))

    def draw(rows: slice) -> Tensor:
        some, count = cond[rows], len(range(256)[rows])
        terms = [(some, 3.0), (replace(some, pooled=some.pooled * 0), -2.0)]  # type: ignore[operator]
        if way == "gpt":
            return list(sample_gpt(cached(network, terms, count), n, lambda i: noise[i, rows, 0]))[-1]
        begin = torch.full((count, n), MASKED)
        return list(sample_maskgit(network, terms, begin, lambda i: noise[i, rows], lambda i: noise[i, rows, :, 0]))[-1]

    together, alone = draw(slice(0, 256)), torch.cat([draw(slice(i, i + 1)) for i in range(256)])
    flipped = int((together != alone).any(1).sum())
    assert flipped <= 2, f"{flipped} of 256 pictures have another code"


# --- tokens ---------------------------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 3), st.sampled_from([(), (4, 8), (2, 2, 8), (32,)]), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_codes_go_to_tokens_and_back(levels: int, digits: tuple[int, ...], h: int, w: int, seed: int) -> None:
    v = Vocabulary(codes=32, levels=levels, grid=(h, w), digits=digits)
    indices = torch.randint(0, 32, (2, h, w, levels), generator=torch.Generator().manual_seed(seed))
    tokens = v.tokens(indices)
    assert tokens.shape == (2, v.length)
    assert torch.equal(v.indices(tokens), indices)
    for s, size in enumerate(v.slots):
        assert int(tokens[:, s :: len(v.slots)].max()) < size


def test_large_codebooks_are_written_as_digits() -> None:
    assert factorised(1024) == ()
    assert factorised(2**18) == (512, 512)
    assert factorised(2**17) == (256, 512)
    assert math.prod(factorised(8 * 5 * 5 * 5 * 1000)) == 10**6
    with pytest.raises(ValueError, match="has the prime factor 65,537"):
        factorised(65_537 * 2)
    with pytest.raises(ValueError, match=r"must be at most 65,536 each: write 262,144 codes as several, such as \(512, 512\)"):
        Vocabulary(codes=2**18)
    with pytest.raises(ValueError, match="must multiply to codes"):
        Vocabulary(codes=32, digits=(4, 4))


# --- choosing -------------------------------------------------------------------------------------------------------------------------------------


def test_a_race_is_what_multinomial_does() -> None:
    logits = torch.randn(4096, 9, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    theirs = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(7))[:, 0]
    race = torch.empty_like(p).exponential_(generator=torch.Generator().manual_seed(7))
    assert torch.equal(chosen(logits, race), theirs)
    assert torch.equal(chosen(logits, race, greedy=True), logits.argmax(-1))


def test_gaussian_noise_gives_the_same_race() -> None:
    e = race_of(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert float(e.mean()) == pytest.approx(1, abs=0.01)
    assert float(e.var()) == pytest.approx(1, abs=0.03)
    assert float(e.min()) > 0


def test_limits_by_hand() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **o: torch.isfinite(limited(logits, **o)).tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.8) == [True, True, False, False]
    assert kept(top_p=0.81) == [True, True, True, False]
    assert kept(top_p=0.01) == [True, False, False, False]
    assert kept(top_k=3, top_p=0.9) == [True, True, True, False]
    assert kept() == [True] * 4


def test_guidance_is_linear_in_log_probabilities() -> None:
    a, b = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    both = torch.cat([a, b])
    torch.testing.assert_close(weighted(both, [1.0, 0.0]).softmax(-1), a.softmax(-1))
    torch.testing.assert_close(weighted(both, [3.0, -2.0]).softmax(-1), (3 * a.log_softmax(-1) - 2 * b.log_softmax(-1)).softmax(-1))


def test_a_mask_keeps_what_is_known() -> None:
    torch.manual_seed(0)
    network = Prior(replace(SMALL, way="maskgit")).eval()
    begin = torch.tensor([[1, MASKED, MASKED, 2]]).repeat(5, 1)
    g = torch.Generator().manual_seed(0)
    race = lambda *shape: lambda _: torch.empty(shape).exponential_(generator=g)  # noqa: E731
    steps = list(sample_maskgit(network, [(Cond(), 1.0)], begin, race(5, 4, 4), race(5, 4)))
    assert len(steps) == 2, "no more steps than there are tokens to fill in"
    for tokens in steps:
        assert (tokens[:, [0, 3]] == torch.tensor([1, 2])).all()
    assert (steps[-1] != MASKED).all()


@given(st.integers(1, 300), st.integers(1, 60))
def test_the_schedule_falls_to_nothing(count: int, steps: int) -> None:
    steps = min(steps, count)
    left = [left_masked(i, steps, count) for i in range(steps)]
    assert left[-1] == 0
    assert all(a > b for a, b in zip([count, *left], left, strict=False))


def test_frequencies_by_hand() -> None:
    tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]])
    shares = lambda known: counted(SQUARE, tokens, known)(tokens, Cond())[0].softmax(-1)  # noqa: E731
    assert shares("places")[0].tolist() == [1, 0, 0, 0]
    assert shares("places")[2].tolist() == [0, 0.5, 0.5, 0]
    assert shares("counts")[3].tolist() == pytest.approx([0.25, 0.375, 0.125, 0.25])
    assert shares("nothing").unique().tolist() == [0.25]
    drawn = list(sample_gpt(cached(counted(SQUARE, tokens, "places"), [(Cond(), 1.0)], 50), 4, lambda _: torch.rand(50, 4)))[-1]  # type: ignore[arg-type]
    assert drawn[:, [0, 1, 3]].unique(dim=0).tolist() == [[0, 1, 3]]


def test_what_a_prior_cannot_be() -> None:
    with pytest.raises(ValueError, match="must be a multiple of 4 x heads"):
        PriorConfig(width=30)
    with pytest.raises(ValueError, match=r"memory .* compares texts"):
        PriorConfig(memory=3, text_width=0)
    with pytest.raises(ValueError, match=r"tokens must be 'b 4', not of shape \(1, 3\)"):
        Prior(SMALL)(torch.zeros(1, 3, dtype=torch.int64), Cond())
