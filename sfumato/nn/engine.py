"""How a network is computed: as it is written (eager), by OpenVINO on a CPU, or compiled by PyTorch on a GPU.

OpenVINO computes a graph that is traced once and kept on the disk, by what its weights are made of and the versions of all that made it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn

import sfumato
from sfumato.core.checkpoint import FileError, cache_folder, free_bytes, size_of
from sfumato.core.language import translated
from sfumato.core.seams import Cond
from sfumato.nn.memory import hand_back

EngineName = Literal["auto", "eager", "openvino", "compile"]
LARGE = 10**8  # parameters from which on the time of tracing comes back within a few pictures
MOST_HELD, MOST_KEPT = 2**31, 20 * 2**30  # bytes of graphs for several shapes in memory, and of all graphs on the disk
ALONE = 1024  # cells of latents from which on rows one by one are no slower than together: one graph for any number of them
HALF_MADE = 3600  # seconds after which nobody is still writing a graph
FURTHEST = 1e-3  # that a graph may be from the network, as a share of its largest number
TRACE_SIDE = 16  # cells of the latents that a graph for any shape is traced with


def choose_engine(asked: EngineName, device: torch.device, dtype: torch.dtype, parameters: int) -> EngineName:
    """The engine for a network of so many parameters. auto: OpenVINO for large networks on a CPU, where it is installed and two copies of the weights
    have room in memory; else eager. Raises ValueError where what is asked for is not here.
    """
    there = importlib.util.find_spec("openvino") is not None
    match asked:
        case "auto":
            roomy = psutil.virtual_memory().available >= 8 * parameters
            return "openvino" if there and device.type == "cpu" and dtype == torch.float32 and parameters >= LARGE and roomy else "eager"
        case "openvino" if not there:
            raise ValueError("engine (='openvino') needs the package openvino: pip install openvino, or take eager")
        case "openvino" if device.type != "cpu" or dtype != torch.float32:
            raise ValueError(f"engine (='openvino') computes in fp32 on a CPU, not in {dtype} on {device.type}: take eager, or compile on a GPU")
        case "compile" if device.type != "cuda":
            raise ValueError("engine (='compile') is for GPUs: on a CPU it takes minutes to begin and is slower afterwards; take openvino or eager")
    return asked


class Engine:
    """What computes the networks of one model. `weights` says what they are made of."""

    def __init__(self, name: EngineName = "eager", weights: str = "") -> None:
        self.name, self.weights = name, weights
        self.changes: dict[int, str | None] = {}  # of networks, by id
        self.made: dict[tuple[int, str], tuple[str, Callable[..., Any]]] = {}

    @contextmanager
    def changed(self, told: str | None, *networks: nn.Module) -> Iterator[None]:
        """Within, these networks are changed in a way that `told` says; None: in one that no graph has, so that they are eager."""
        before = self.changes
        now = {id(n): before.get(id(n), "") for n in networks}
        self.changes = before | {i: None if told is None or was is None else f"{was} {told}".strip() for i, was in now.items()}
        try:
            yield
        finally:
            self.changes = before

    def of(self, network: nn.Module, method: str = "forward", *, dynamic: bool = False) -> Callable[..., Any]:
        """What computes a method of a network that takes tensors and conditions. `dynamic`: one graph of it is right for any shape."""
        plain: Callable[..., Any] = network if method == "forward" else getattr(network, method)
        change, key = self.changes.get(id(network), ""), (id(network), method)
        if self.name == "eager" or (self.name == "openvino" and change is None):
            return plain
        weights = "" if self.name == "compile" else f"{self.weights} {change}".strip()
        if self.made.get(key, (None,))[0] != weights:
            self.made.pop(key, None)  # graphs of other weights are not held beside these
            self.made[key] = weights, torch.compile(plain) if self.name == "compile" else Graphs(network, method, weights, dynamic)
        return self.made[key][1]

    @property
    def version(self) -> str:
        """As a picture's record says it."""
        return f"openvino {importlib.metadata.version('openvino')}" if self.name == "openvino" else f"torch {torch.__version__}"


# --- OpenVINO -------------------------------------------------------------------------------------------------------------------------------------


class _Traced(nn.Module):
    """A method of a network as one of tensors alone."""

    def __init__(self, network: nn.Module, method: str, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.network, self.method, self.args = network, method, args

    def forward(self, *tensors: Tensor) -> Any:
        left = list(tensors)
        return getattr(self.network, self.method)(*(_filled(a, left) for a in self.args))


def _leaves(args: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    """All tensors of what a method is called with, in order, by names."""
    found: list[tuple[str, Tensor]] = []
    for i, a in enumerate(args):
        if isinstance(a, Tensor):
            found.append((str(i), a))
            continue
        named = {f.name: getattr(a, f.name) for f in fields(a) if f.name != "extra"} | a.extra
        found += [(f"{i}.{name}", v) for name, v in named.items() if v is not None]
    return found


def _filled(a: Any, left: list[Tensor]) -> Any:
    """What is like `a` with the next of the tensors that are left."""
    if isinstance(a, Tensor):
        return left.pop(0)
    named = {f.name: None if getattr(a, f.name) is None else left.pop(0) for f in fields(a) if f.name != "extra"}
    return Cond(**named, extra={k: left.pop(0) for k in a.extra})


def _rows(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """What a method is called with, a row at a time."""
    for i in range(len(args[0])):
        yield tuple(a[i : i + 1] for a in args)


class Graphs:
    """Called like a method of a network, computes it by OpenVINO, with one graph for each shape."""

    def __init__(self, network: nn.Module, method: str, weights: str, dynamic: bool) -> None:
        self.network, self.method, self.weights, self.dynamic = network, method, weights, dynamic
        self.bytes = sum(p.numel() * 4 for p in network.parameters())
        self.compiled: dict[Any, Any] = {}

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        x = args[0]
        if self.dynamic and len(x) > 1 and x.shape[-1] * x.shape[-2] >= ALONE:
            parts = [self._run(row) for row in _rows(args)]
            return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))
        return self._run(args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        named = _leaves(args)
        key = (torch.get_num_threads(), *((name, tuple(v.shape), str(v.dtype)) for name, v in named))
        if key not in self.compiled:
            while self.compiled and self.bytes * (len(self.compiled) + 1) > MOST_HELD:
                del self.compiled[next(iter(self.compiled))]
            self.compiled[key] = self._compile(args, named)
        out = self.compiled[key].infer([v.contiguous().numpy() for _, v in named], share_inputs=True, share_outputs=True)
        found = tuple(torch.from_numpy(v).clone() for v in out.values())
        return found if len(found) > 1 else found[0]

    def _compile(self, args: tuple[Any, ...], named: list[tuple[str, Tensor]]) -> Any:
        import openvino as ov

        folder = cache_folder() / "engine" / self._digest(named)
        made = not (folder / "graph.xml").exists()
        if made:
            self._convert(args, folder)
        os.utime(folder)
        core = ov.Core()
        model = core.read_model(folder / "graph.xml")
        model.reshape({port: list(v.shape) for port, (_, v) in zip(model.inputs, named, strict=True)})
        told = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1,
                "CACHE_DIR": str(folder / "compiled"), "CACHE_MODE": "OPTIMIZE_SIZE"}  # fmt: skip
        request = core.compile_model(model, "CPU", told).create_infer_request()
        if made:
            self._check(request, args, named, folder)
        hand_back(self.network, (folder / "graph.bin").resolve())
        return request

    def _digest(self, named: list[tuple[str, Tensor]]) -> str:
        made_by = [f"{p} {importlib.metadata.version(p)}" for p in ("openvino", "torch")] + [f"sfumato {sfumato.__version__}"]
        shapes = [[name, v.ndim if self.dynamic else list(v.shape), str(v.dtype)] for name, v in named]
        what = [self.weights, type(self.network).__name__, self.method, shapes, made_by, repr(getattr(self.network, "config", None))]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]

    def _convert(self, args: tuple[Any, ...], folder: Path) -> None:
        """Traces the method and writes its graph, whole or not at all. Raises FileError where there is no room for it."""
        import openvino as ov
        from openvino.frontend import FrontEndManager, GeneralFailure, OpConversionFailure
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        folder.parent.mkdir(parents=True, exist_ok=True)
        if free_bytes(folder.parent) < 1.1 * self.bytes:
            raise FileError(f"{folder.parent} has no room for the {self.bytes / 1e9:.1f} GB of a network's graph: free some, or take --engine eager")
        if self.bytes > 4 * LARGE:
            print(translated(f"openvino: making a graph of {self.bytes / 1e9:.1f} GB, once; a minute or so"), file=sys.stderr)
        began, part = time.perf_counter(), Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=".part"))
        try:
            example = self._small(args) if self.dynamic else args
            traced = _Traced(self.network, self.method, example).eval()
            with _silent():  # and by its frontend, as openvino.convert_model tells others that it was called
                inputs = tuple(v for _, v in _leaves(example))
                decoder = TorchScriptPythonDecoder(traced, example_input=inputs, trace_kwargs={"check_trace": False})
                frontend = FrontEndManager().load_by_framework("pytorch")
                ov.serialize(frontend.convert(frontend.load(decoder)), part / "graph.xml", part / "graph.bin")
            _make_room(folder.parent, MOST_KEPT - size_of(part))
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
        except (RuntimeError, GeneralFailure, OpConversionFailure) as e:
            raise FileError(f"openvino cannot compute this network: take --engine eager ({str(e).strip().splitlines()[-1][:200]})") from e
        finally:
            shutil.rmtree(part, ignore_errors=True)
        if self.bytes > 4 * LARGE:
            print(translated(f"openvino: made in {time.perf_counter() - began:.0f} s, {size_of(folder) / 1e9:.1f} GB in {folder}"), file=sys.stderr)

    def _small(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same at a few cells: tracing is quick, and the graph is for any number of them."""
        cut = lambda v: v[..., :TRACE_SIDE, :TRACE_SIDE].contiguous() if v.ndim == 4 else v  # noqa: E731
        return tuple(cut(a) if isinstance(a, Tensor) else a.map(cut) for a in args)

    def _check(self, request: Any, args: tuple[Any, ...], named: list[tuple[str, Tensor]], folder: Path) -> None:
        """Raises FileError where a new graph does not say what the network says."""
        expected = getattr(self.network, self.method)(*args)
        found = request.infer([v.contiguous().numpy() for _, v in named])
        for a, b in zip((expected,) if isinstance(expected, Tensor) else expected, found.values(), strict=True):
            gap = float((a - torch.from_numpy(b)).abs().max() / a.abs().max().clamp_min(1e-6))
            if not gap <= FURTHEST:
                shutil.rmtree(folder, ignore_errors=True)
                raise FileError(f"openvino computes another result than the network (off by {gap:.1e}): take --engine eager, and please tell us")


@contextmanager
def _silent() -> Iterator[None]:
    """Without what tracing says of the branches that it takes."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _make_room(folder: Path, most: int) -> None:
    """Removes what a process left that was killed, and graphs that were not used for longest until the others have `most` bytes together."""
    for path in folder.glob(".*.part"):
        if time.time() - path.stat().st_mtime > HALF_MADE:
            shutil.rmtree(path, ignore_errors=True)
    kept = sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.stat().st_mtime)
    total = sum(map(size_of, kept))
    for path in kept:
        if total <= most:
            return
        total -= size_of(path)
        shutil.rmtree(path, ignore_errors=True)


EAGER = Engine()
