"""Pages of files that are handed back and come again, and halves that stay halves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.nn.memory import hand_back, keep_halves, moved

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is handed back")


def held(what: str) -> int:
    """KiB of this process, as Linux says."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))


def from_file(path: Path, n: int = 2048) -> tuple[nn.Linear, torch.Tensor]:
    weight = torch.randn(n, n)
    save_file({"weight": weight}, path)
    with torch.device("meta"):
        net = nn.Linear(n, n, bias=False)
    net.load_state_dict(load_file(path), assign=True)
    return net.requires_grad_(False), weight


@linux
def test_what_was_freed_is_used_again() -> None:
    """Without new pages from the system: 120 MiB, too, which PyTorch's convolutions of wide layers need at every call (else 30,000 each, or 60 of the
    huge ones).
    """
    script = """
import resource, sys
from sfumato.nn.memory import keep_pages
if sys.argv[1:]:
    keep_pages()
import torch
pages = []
for _ in range(6):
    torch.ones(120 * 2**18)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(pages[-1] - pages[2])
"""
    faults = lambda *args: int(subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=True).stdout)  # noqa: E731
    assert faults("kept") < min(300, faults() / 5)


@linux
def test_pages_of_a_file_are_handed_back_and_come_again(tmp_path: Path) -> None:
    net, weight = from_file(tmp_path / "a.safetensors")
    assert torch.equal(net.weight, weight)
    before = held("RssFile")
    assert hand_back(net) >= weight.nbytes
    assert before - held("RssFile") > 0.9 * weight.nbytes / 1024
    assert torch.equal(net.weight, weight)


@linux
def test_what_was_written_to_is_kept(tmp_path: Path) -> None:
    net, weight = from_file(tmp_path / "a.safetensors")
    net.weight[3, 4] += 1
    assert hand_back(net) == 0
    weight[3, 4] += 1
    assert torch.equal(net.weight, weight)


@linux
def test_other_numbers_take_the_place_of_a_file_part_by_part(tmp_path: Path) -> None:
    halves = {f"{i}.weight": torch.randn(2048, 2048).half() for i in range(4)}
    save_file(halves, tmp_path / "a.safetensors")
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    net.load_state_dict(load_file(tmp_path / "a.safetensors"), assign=True)
    seen: list[int] = []
    for part in net:
        part._apply = lambda f, recurse=True, part=part: (seen.append(held("RssFile")), nn.Module._apply(part, f, recurse))[1]  # type: ignore[assignment]
    moved(net, torch.device("cpu"), torch.float32)
    assert all(torch.equal(net.state_dict()[k], v.float()) for k, v in halves.items())
    assert max(seen[1:4]) - seen[0] < 2 * halves["0.weight"].nbytes / 1024, "no more of the file than two parts"


def test_weights_in_memory_are_left_alone() -> None:
    net = nn.Linear(512, 512)
    before = net.weight.clone()
    assert hand_back(net) == 0
    assert torch.equal(net.weight, before)


def test_halves_compute_in_fp32_and_stay_halves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)).requires_grad_(False).half()
    wide = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 1)).requires_grad_(False)
    wide.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
    x = torch.randn(2, 3, 8, 8)
    found = keep_halves(net)(x)
    assert torch.equal(found, wide(x))
    assert {p.dtype for p in net.parameters()} == {torch.float16}
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 5, 8, 8))
    assert {p.dtype for p in net.parameters()} == {torch.float16}, "after an error, too"
    assert torch.equal(net(x), found)
