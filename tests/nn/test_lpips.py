"""LPIPS beside torchmetrics', on backbones of the layouts that torchvision saves, with random weights: its own cannot be had offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import lpips as reference

from sfumato.core.checkpoint import FileError
from sfumato.nn.lpips import FILES, WIDTHS, lpips_from

SHAPES = {  # of torchvision's files, whose keys are "features.N..." and "classifier.N..."
    "alex": {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)},
    "vgg": {
        0: (64, 3, 3, 3), 2: (64, 64, 3, 3), 5: (128, 64, 3, 3), 7: (128, 128, 3, 3), 10: (256, 128, 3, 3), 12: (256, 256, 3, 3),
        14: (256, 256, 3, 3), 17: (512, 256, 3, 3), 19: (512, 512, 3, 3), 21: (512, 512, 3, 3), 24: (512, 512, 3, 3), 26: (512, 512, 3, 3),
        28: (512, 512, 3, 3),
    },
}  # fmt: skip
FIRES = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128), 9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256),
         12: (512, 64, 256)}  # fmt: skip


def checkpoint(kind: str) -> dict[str, Tensor]:
    """Random weights of a torchvision file."""
    g = torch.Generator().manual_seed(0)
    shapes = {f"features.{i}": s for i, s in SHAPES.get(kind, {0: (64, 3, 3, 3)}).items()}
    if kind == "squeeze":
        for i, (cin, squeeze, expand) in FIRES.items():
            shapes |= {f"features.{i}.squeeze": (squeeze, cin, 1, 1), f"features.{i}.expand1x1": (expand, squeeze, 1, 1)}
            shapes[f"features.{i}.expand3x3"] = (expand, squeeze, 3, 3)
    tensors = {f"{k}.weight": torch.randn(s, generator=g) * (2 / (s[1] * s[2] * s[3])) ** 0.5 for k, s in shapes.items()}
    tensors |= {f"{k}.bias": torch.randn(s[0], generator=g) * 0.1 for k, s in shapes.items()}
    return tensors | {"classifier.1.weight": torch.zeros(10, 4)}


class TheirFire(nn.Module):
    def __init__(self, cin: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze, self.squeeze_activation = nn.Conv2d(cin, squeeze, 1), nn.ReLU()
        self.expand1x1, self.expand1x1_activation = nn.Conv2d(squeeze, expand, 1), nn.ReLU()
        self.expand3x3, self.expand3x3_activation = nn.Conv2d(squeeze, expand, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze_activation(self.squeeze(x))
        return torch.cat([self.expand1x1_activation(self.expand1x1(x)), self.expand3x3_activation(self.expand3x3(x))], 1)


def their_features(kind: str, tensors: dict[str, Tensor]) -> nn.Sequential:
    """torchvision's `features`, written layer by layer."""
    layers: list[nn.Module]
    if kind == "alex":
        layers = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
                  nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
                  nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2)]  # fmt: skip
    elif kind == "vgg":
        layers, pools = [], {4, 9, 16, 23, 30}
        for i in range(31):
            conv = SHAPES["vgg"].get(i)
            layers.append(nn.Conv2d(conv[1], conv[0], 3, padding=1) if conv else nn.MaxPool2d(2, 2) if i in pools else nn.ReLU())
    else:
        fixed = {0: nn.Conv2d(3, 64, 3, 2), 1: nn.ReLU()} | {i: nn.MaxPool2d(3, 2, ceil_mode=True) for i in (2, 5, 8)}
        layers = [fixed[i] if i in fixed else TheirFire(*FIRES[i]) for i in range(13)]
    network = nn.Sequential(*layers)
    network.load_state_dict({k.removeprefix("features."): v for k, v in tensors.items() if k.startswith("features.")})
    return network


@pytest.mark.parametrize("kind", list(FILES))
def test_lpips_is_torchmetrics_s(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = checkpoint(kind)
    torch.save(tensors, tmp_path / "backbone.pth")
    ours = lpips_from(tmp_path / "backbone.pth")
    assert ours is not None
    assert (ours.kind, ours.verified) == (kind, False), "random weights are not torchvision's"
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda net, pretrained: their_features(kind, tensors))
    theirs = reference._NoTrainLpips(net=kind)
    x, y = torch.rand(2, 3, 3, 70, 64, generator=torch.Generator().manual_seed(1))
    expected = theirs(x, y, normalize=True).flatten()
    assert float(expected.min()) > 0
    torch.testing.assert_close(ours(x, y), expected, rtol=1e-5, atol=1e-7)
    assert float(ours(x, x).abs().max()) == 0
    assert float((ours(x, y) - ours(y, x)).abs().max()) < 1e-6


def test_the_backbone_is_looked_for_where_torch_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips_from() is None
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint("squeeze"), tmp_path / "checkpoints" / FILES["squeeze"])
    found = lpips_from()
    assert found is not None
    assert found.kind == "squeeze"
    assert len(found.heads) == len(WIDTHS["squeeze"])


def test_files_that_are_no_backbone(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no file"):
        lpips_from(tmp_path / "gone.pth")
    (tmp_path / "text.pth").write_text("no")
    with pytest.raises(FileError, match="not a checkpoint that can be read"):
        lpips_from(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(FileError, match="holds none of AlexNet"):
        lpips_from(tmp_path / "other.pth")
