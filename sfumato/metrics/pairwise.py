"""How far a picture is from the one it should be: functions of (picture, target), both "b c h w" in [0, 1], one value a picture.

In fp64, so that the arithmetic is that of the reference implementations. Pictures with transparency are judged over white and over black,
`over_both`: an error that one ground hides the other shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sfumato.nn.backbones import over

PERFECT = 100.0  # dB, said of equal pictures, whose PSNR has no bound
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, Wang et al. 2003
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)  # D65


def over_both(metric: Callable[..., Tensor], x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """A metric of RGB pictures, for premultiplied RGBA: the mean of its values over white and over black; RGB as it is.

    PSNR is that of the mean error over both: the mean of two PSNRs would hide an error that only one ground shows.
    """
    if x.shape[1] != 4:
        return metric(x, y)
    if metric is psnr:
        return _decibels(over_both(mse, x, y))
    return (metric(over(x, 1.0), over(y, 1.0)) + metric(over(x, 0.0), over(y, 0.0))) / 2


def mse(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean squared error."""
    return (x.double() - y.double()).square().mean((1, 2, 3))


def psnr(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio in dB, of a range of 1; PERFECT at most."""
    return _decibels(mse(x, y))


def _decibels(error: Tensor) -> Tensor:
    return (-10 * error.clamp_min(1e-300).log10()).clamp_max(PERFECT)


def ssim(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Structural similarity (Wang et al. 2004) with a flat 7 x 7 window and unbiased variances: scikit-image's default.

    Raises ValueError below 7 x 7 pixels.
    """
    if min(x.shape[-2:]) < 7:
        raise ValueError(f"SSIM needs 7 x 7 pixels at least, not {x.shape[-1]} x {x.shape[-2]}")
    x, y = x.double(), y.double()
    local = lambda a: F.avg_pool2d(a, 7, 1)  # noqa: E731
    return _structure(x, y, local, 49 / 48)[0].mean((1, 2, 3))


def _structure(x: Tensor, y: Tensor, local: Callable[[Tensor], Tensor], unbiased: float = 1.0) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure part, as maps (equations 12 and 13 with C1 = 0.01^2, C2 = 0.03^2)."""
    c1, c2 = 0.01**2, 0.03**2
    mx, my = local(x), local(y)
    vx, vy, vxy = (unbiased * (local(a * b) - ma * mb) for a, b, ma, mb in ((x, x, mx, mx), (y, y, my, my), (x, y, mx, my)))
    structure = (2 * vxy + c2) / (vx + vy + c2)
    return structure * (2 * mx * my + c1) / (mx.square() + my.square() + c1), structure


def _gaussian(a: Tensor, sigma: float = 1.5, size: int = 11) -> Tensor:
    at = torch.arange(size, dtype=a.dtype, device=a.device) - size // 2
    k = torch.exp(-at.square() / (2 * sigma**2))
    k = (k / k.sum()).expand(a.shape[1], 1, 1, -1)
    return F.conv2d(F.conv2d(a, k, groups=a.shape[1]), k.transpose(2, 3), groups=a.shape[1])


def ms_ssim(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Multi-scale structural similarity (Wang et al. 2003): Gaussian window of 11, sigma 1.5, five scales from 176 pixels of a side on.

    Smaller pictures have as many scales as their window fits into, with the weights of these made to sum to 1: such values compare with each
    other, not with those of five scales. Negative parts count as 0. Raises ValueError below 11 x 11 pixels.
    """
    side = min(x.shape[-2:])
    if side < 11:
        raise ValueError(f"MS-SSIM needs 11 x 11 pixels at least, not {x.shape[-1]} x {x.shape[-2]}")
    scales = sum(side >> s >= 11 for s in range(len(MS_SSIM_WEIGHTS)))  # each halves the side
    weights = torch.tensor(MS_SSIM_WEIGHTS[:scales], dtype=torch.float64, device=x.device)
    weights = weights / weights.sum() if scales < len(MS_SSIM_WEIGHTS) else weights
    a, b, parts = x.double(), y.double(), []
    for scale in range(scales):
        if scale < scales - 1:
            part = _structure(a, b, _gaussian)[1]
        else:  # the coarsest keeps its size, reflected at the borders, as the reference implementations have it
            part = _structure(*(F.pad(v, (5, 5, 5, 5), mode="reflect") for v in (a, b)), _gaussian)[0]
        parts.append(part.mean((1, 2, 3)).clamp_min(0))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return torch.stack([p**w for p, w in zip(parts, weights, strict=True)]).prod(0)


def edge_error(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean absolute difference of the lengths of Sobel gradients of the luma (each in [0, about 1.4])."""
    return (_edges(x) - _edges(y)).abs().mean((1, 2, 3))


def _edges(x: Tensor) -> Tensor:
    grey = (x.double() * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=x.device)[:, None, None]).sum(1, keepdim=True)
    k = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], dtype=torch.float64, device=x.device) / 4
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    return torch.sqrt(sum(F.conv2d(padded, kernel[None, None]).square() for kernel in (k, k.T)) / 2 + 1e-30)


def colour_error(x: Float[Tensor, "b c h w"], y: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Mean CIE 1976 difference of colours: Euclidean in L*a*b* (D65, sRGB); 2.3 is what one just sees."""
    return (_lab(x) - _lab(y)).square().sum(1).sqrt().mean((1, 2))


def _lab(x: Tensor) -> Tensor:
    """sRGB in [0, 1] -> L*a*b*."""
    x = x.double()
    linear = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = torch.einsum("ij,bjhw->bihw", torch.tensor(RGB_TO_XYZ, dtype=x.dtype, device=x.device), linear)
    t = xyz / torch.tensor(WHITE, dtype=x.dtype, device=x.device)[:, None, None]
    f = torch.where(t > 0.008856, t.clamp_min(1e-12) ** (1 / 3), 7.787 * t + 16 / 116)
    fx, fy, fz = f.unbind(1)
    return torch.stack([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)], dim=1)


PAIRWISE: dict[str, tuple[Callable[..., Tensor], str, int]] = {
    "mse": (mse, "", -1),
    "psnr": (psnr, "dB", 1),
    "ssim": (ssim, "", 1),
    "ms_ssim": (ms_ssim, "", 1),
    "edge_error": (edge_error, "", -1),
    "colour_error": (colour_error, "dE76", -1),
}
"""{name: (function, unit, 1 where more is better)}."""
