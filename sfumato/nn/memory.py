"""Memory of networks that compute on a CPU: freed pages are kept for the next step, pages of files are handed back, halves stay halves."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
ROOM = 3 * 2**27  # bytes that larger tensors find free: three of those that a wide convolution of Stable Diffusion takes
LARGEST_KEPT = 2**25  # bytes; of what is larger, all would leave gaps that nothing fits into (1.3 GiB more to decode a picture of 512 x 512)
DONTNEED = 4  # of madvise(2)
MAPPED = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(/.*)")  # a line of /proc/self/smaps that begins a file's mapping: from, to, path


def keep_pages() -> None:
    """What is freed stays with the process and is used again: tensors up to 32 MiB, and one after the other larger ones (weights in another order for
    one convolution) where 384 MiB have room for them. Otherwise the C library (glibc) gives each of them back to the system, which fills its pages
    with zeros for the next one: a fifth of a UNet's step. Elsewhere nothing happens.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        for option, value in ((MMAP_THRESHOLD, LARGEST_KEPT), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26)):
            library.mallopt(option, value)
        _room = [torch.empty(LARGEST_KEPT // 2, dtype=torch.uint8) for _ in range(2 * ROOM // LARGEST_KEPT)]  # and is free again at once


def hand_back(network: nn.Module, file: Path | None = None) -> int:
    """Gives the system the memory of weights that are pages of a file (or of this file), and says how many bytes. They are read again when they are
    needed, mostly from the system's own copy. Files of which a page was written to are left alone: nothing is lost. Linux only; elsewhere it is 0.
    """
    if sys.platform != "linux":
        return 0
    values = (*network.parameters(), *network.buffers())
    held = [v.untyped_storage() for v in values if v.device.type == "cpu" and type(v.data) is torch.Tensor]  # not those cut up among processes
    spans = [(v.data_ptr(), v.data_ptr() + v.nbytes()) for v in held]
    library, total = ctypes.CDLL(None), 0
    for start, end, path in _untouched():
        if path == str(file) or any(start <= low and high <= end for low, high in spans):
            library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
            total += end - start
    return total


def _untouched() -> list[tuple[int, int, str]]:
    """Where files are mapped into this process of which no page is its own: from, to, path."""
    found: list[tuple[int, int, str]] = []
    begun: re.Match[str] | None = None
    with open("/proc/self/smaps", encoding="utf-8", errors="replace") as told:
        for line in told:
            if not line[0].isupper():  # whereas what is said of a mapping begins with a name
                begun = MAPPED.match(line)
            elif begun and line.startswith(("Anonymous:", "Swap:")) and line.split()[1] != "0":
                begun = None
            elif begun and line.startswith("VmFlags:"):  # the last that is said of it
                found.append((int(begun[1], 16), int(begun[2], 16), begun[3].rstrip("\n")))
    return found


def moved(network: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """network.to(device, dtype), a part after the other: pages of a file that became other numbers are handed back before the next are read."""
    for part in network.children():
        part.to(device, dtype)
        hand_back(network)
    return network.to(device, dtype)


def keep_halves(network: nn.Module) -> nn.Module:
    """The network with weights of 16 bits as they are, and fp32 for all others; each layer computes in fp32 with a copy that lives as long as its own
    step.
    """
    for layer in network.modules():
        layer._apply(lambda v: v.float() if v.is_floating_point() and v.dtype.itemsize not in (2, 4) else v, recurse=False)
        if any(p.dtype.itemsize == 2 for p in layer.parameters(recurse=False)):
            layer.computes_in = torch.float32  # type: ignore[assignment]
            _Widened(layer)
    return network


class _Widened:
    """A layer's weights, in fp32 while it runs: for one caller after the other."""

    def __init__(self, layer: nn.Module) -> None:
        self.halves: dict[str, Any] = {}
        self.busy = threading.Lock()
        layer.register_forward_pre_hook(self.widen)
        layer.register_forward_hook(self.narrow, always_call=True)

    def __deepcopy__(self, memo: Any) -> _Widened:
        """For a copy of the layer, whose hooks are copied with it."""
        copied = _Widened.__new__(_Widened)
        copied.halves, copied.busy = {}, threading.Lock()
        return copied

    def widen(self, layer: nn.Module, given: tuple[Any, ...]) -> None:
        self.busy.acquire()
        own = layer._parameters
        self.halves = dict(own)
        own.update({k: nn.Parameter(p.float(), requires_grad=False) for k, p in own.items() if p is not None and p.dtype.itemsize == 2})

    def narrow(self, layer: nn.Module, given: tuple[Any, ...], out: torch.Tensor) -> None:
        layer._parameters.update(self.halves)
        self.busy.release()


def hooked(network: nn.Module) -> bool:
    """Whether something changes what its layers compute, beside halves that become whole."""
    hooks = (h for m in network.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return any(not isinstance(getattr(h, "__self__", None), _Widened) for h in hooks)
