import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.core.seams import Cond
from sfumato.diffusion.path import PathConfig, make_path, ve_path
from sfumato.diffusion.precond import Precond, from_x0, target, to_x0

f64 = torch.float64
PATHS = [make_path(PathConfig(kind=kind)) for kind in ("rf", "vp-cosine", "vp-linear")] + [ve_path()]
PAIRS = [(p, kind) for p in PATHS for kind in ("v", "eps", "x0", "flow") if kind != "flow" or p.kind == "rf"]


@settings(max_examples=60, deadline=None)
@given(pair=st.sampled_from(PAIRS), t=st.floats(0.02, 0.98), seed=st.integers(0, 1000))
def test_conversions_round_trip(pair, t, seed):
    path, kind = pair
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 2, 3, 3, generator=g, dtype=f64), torch.randn(2, 2, 3, 3, generator=g, dtype=f64)
    t = torch.full((2,), t, dtype=f64)
    x_t, wanted = path.mix(x0, noise, t), target(kind, x0, noise, t, path)
    assert torch.allclose(to_x0(kind, wanted, x_t, t, path), x0, atol=1e-10)
    assert torch.allclose(from_x0(kind, x0, x_t, t, path), wanted, atol=1e-6, rtol=1e-6)
    out = torch.randn(2, 2, 3, 3, generator=g, dtype=f64)  # any output, not only a perfect one
    assert torch.allclose(from_x0(kind, to_x0(kind, out, x_t, t, path), x_t, t, path), out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("path", "kind"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_ends_are_exact(path, kind):
    x0, noise, t = torch.randn(2, 3, dtype=f64), torch.randn(2, 3, dtype=f64), torch.tensor([0.0, 1.0], dtype=f64)
    x_t = path.mix(x0, noise, t)
    got = to_x0(kind, target(kind, x0, noise, t, path), x_t, t, path)
    assert torch.allclose(got[0], x0[0], atol=1e-14)
    if kind == "eps" and path.reaches_zero:
        assert torch.equal(got[1], torch.zeros(3, dtype=f64))  # as its docstring says
    else:
        assert torch.allclose(got[1], x0[1], atol=1e-12)
    assert from_x0(kind, x0, x_t, t, path).isfinite().all()


def test_flow_is_the_derivative_of_x_t(rf):
    x0, noise, t = torch.randn(1, 3, dtype=f64), torch.randn(1, 3, dtype=f64), torch.tensor([0.4], dtype=f64)
    slope = (rf.mix(x0, noise, t + 1e-4) - rf.mix(x0, noise, t - 1e-4)) / 2e-4
    assert torch.allclose(target("flow", x0, noise, t, rf), slope)


@pytest.mark.parametrize(("path", "kind"), PAIRS, ids=lambda v: v if isinstance(v, str) else v.kind)
def test_precond_is_the_denoiser_whatever_the_network_predicts(path, kind, gaussian):
    net = gaussian.net(path, lambda x0, x, t: from_x0(kind, x0, x, t, path))
    x, t = torch.randn(4, 2, 3, 3, dtype=f64), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=f64)
    x0 = Precond(net, kind, path)(x, t, Cond())
    assert torch.allclose(x0, gaussian.denoise(path)(x, t), atol=1e-8)


def test_precond_casts_to_the_network_and_back_and_leaves_concat_alone(rf):
    seen = {}

    def net(x, t, cond):
        seen.update(x=x.dtype, t=t.dtype, concat=cond.concat)
        return x

    concat = 100 * torch.ones(2, 1, 2, 2)
    x0 = Precond(net, "flow", rf, dtype=torch.bfloat16)(torch.randn(2, 1, 2, 2, dtype=f64), torch.full((2,), 0.5, dtype=f64), Cond(concat=concat))
    assert (seen["x"], seen["t"], x0.dtype) == (torch.bfloat16, torch.float32, f64)
    assert seen["concat"] is concat


def test_errors_name_the_value(rf, paths):
    with pytest.raises(ValueError, match=r"'epss'.*did you mean 'eps'"):
        Precond(lambda x, t, c: x, "epss", rf)
    with pytest.raises(ValueError, match=r"'flow'.*not 'vp-cosine': use 'v'"):
        Precond(lambda x, t, c: x, "flow", paths["vp-cosine"])
    with pytest.raises(ValueError, match="'flow'"):
        to_x0("flow", torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), paths["vp-linear"])
