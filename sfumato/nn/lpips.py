"""LPIPS (arXiv 1801.03924): how far two pictures are apart for a network trained on ImageNet, weighted by what people called similar.

The backbone's weights are the user's: a torchvision checkpoint of AlexNet, VGG-16 or SqueezeNet 1.1, told apart by their tensors. The small
linear heads come with the package torchmetrics.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sfumato.core.checkpoint import FileError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of inputs in [-1, 1]
FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}  # named by their sha256
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29), "squeeze": (1, 4, 7, 9, 10, 11, 12)}
WIDTHS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512), "squeeze": (64, 128, 256, 384, 384, 512, 512)}


class Fire(nn.Module):
    """Squeeze, then expand by 1 x 1 and by 3 x 3 (arXiv 1602.07360)."""

    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def features(kind: str) -> nn.Sequential:
    """The convolutions of a backbone, numbered as torchvision numbers them."""
    if kind == "squeeze":
        pool = lambda: nn.MaxPool2d(3, 2, ceil_mode=True)  # noqa: E731
        fires = [Fire(*w) for w in ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128), (256, 48, 192), (384, 48, 192), (384, 64, 256))]
        return nn.Sequential(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), *fires[:2], pool(), *fires[2:4], pool(), *fires[4:], Fire(512, 64, 256))
    if kind == "alex":
        convs = [nn.Conv2d(3, 64, 11, 4, 2), nn.Conv2d(64, 192, 5, padding=2), nn.Conv2d(192, 384, 3, padding=1)]
        convs += [nn.Conv2d(384, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1)]
        one, two, *rest = ([c, nn.ReLU()] for c in convs)
        return nn.Sequential(*one, nn.MaxPool2d(3, 2), *two, nn.MaxPool2d(3, 2), *(layer for pair in rest for layer in pair))
    layers: list[nn.Module] = []
    cin = 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(cin, width, 3, padding=1), nn.ReLU()]
            cin = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])


class LPIPS(nn.Module):
    """Distance of pictures "b 3 h w" in [0, 1], one a pair. `digest` and `verified` say which weights look, and whether they are torchvision's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.digest, self.verified = kind, "", False
        self.features = features(kind)
        self.heads = nn.ParameterList(nn.Parameter(torch.zeros(1, width, 1, 1)) for width in WIDTHS[kind])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])

    def maps(self, x: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """Activations at the taps, each of unit length over its channels."""
        x, found = (x * 2 - 1 - self.shift) / self.scale, []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in TAPS[self.kind]:
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def forward(self, x: Float[Tensor, "b 3 h w"], y: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        taps = zip(self.heads, self.maps(x), self.maps(y), strict=True)
        return sum(((a - b).square() * head).sum(1).mean((1, 2)) for head, a, b in taps)  # type: ignore[return-value]


def lpips_from(file: Path | None = None) -> LPIPS | None:
    """LPIPS on the backbone in `file`; without one on what lies in torch's folder of downloads, None where nothing does.

    Raises FileError where the file holds none of the three backbones, ValueError where torchmetrics is missing.
    """
    if file is None:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        file = next((folder / f for f in FILES.values() if (folder / f).exists()), None)
        if file is None or importlib.util.find_spec("torchmetrics") is None:
            return None
    if not file.is_file():
        raise FileError(f"there is no file {file}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        kept = {k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")}
    except Exception as e:  # pickle has many ways to fail
        raise FileError(f"{file} is not a checkpoint that can be read: {str(e).splitlines()[0]}") from None
    kinds = [k for k in FILES if {n: v.shape for n, v in kept.items()} == {n: v.shape for n, v in features(k).state_dict().items()}]
    if not kinds:
        raise FileError(f"{file} holds none of AlexNet, VGG-16 and SqueezeNet 1.1 as torchvision saves them: LPIPS needs one of these")
    network = LPIPS(kinds[0])
    network.features.load_state_dict(kept)
    for head, weight in zip(network.heads, _heads(kinds[0]), strict=True):
        head.data.copy_(weight)
    network.digest = hashlib.sha256(file.read_bytes()).hexdigest()
    network.verified = FILES[kinds[0]].rpartition("-")[2].removesuffix(".pth") == network.digest[:8]
    return network.eval().requires_grad_(False)


def _heads(kind: str) -> list[Tensor]:
    spec = importlib.util.find_spec("torchmetrics")
    if spec is None or spec.origin is None:
        raise ValueError("LPIPS takes its linear heads from the package torchmetrics: pip install torchmetrics")
    tensors = torch.load(Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{kind}.pth", map_location="cpu", weights_only=True)
    return [tensors[f"lin{i}.model.1.weight"] for i in range(len(WIDTHS[kind]))]
