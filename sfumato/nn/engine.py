"""How a network is computed: as it is written (eager), by OpenVINO on a CPU, or compiled by PyTorch on a GPU.

OpenVINO computes a graph that is traced once and kept on the disk, by the network's weights and build and the versions of all that made it.
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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from torch import Tensor, nn

import sfumato
from sfumato.core.checkpoint import FileError, cache_folder, free_bytes, size_of
from sfumato.core.config import nearest
from sfumato.core.language import translated
from sfumato.core.seams import Cond
from sfumato.nn import winograd
from sfumato.nn.memory import hand_back, hooked

EngineName = Literal["auto", "eager", "openvino", "compile"]
ROOM = 10  # bytes of memory for each parameter: its page of the file, and what is computed with
LARGE = 10**8  # parameters from which on the time of tracing comes back within a few pictures
MOST_HELD, MOST_KEPT = 2**31, 20 * 2**30  # bytes of graphs for several shapes in memory, and of all graphs on the disk
ALONE = 1024  # cells of latents from which on rows one by one are no slower than together: one graph for any number of them
HALF_MADE = 3600  # seconds after which nobody is still writing a graph
FURTHEST = 1e-3  # that a graph may be from the network, as a share of its largest number
SAMPLED = 256  # numbers of a tensor, at three places, by which it is known
TRACE_SIDE = 16  # cells of the latents that a graph for any shape is traced with


def choose_engine(asked: EngineName, device: torch.device, dtype: torch.dtype, parameters: int) -> EngineName:
    """The engine for a network of so many parameters. auto: OpenVINO for large networks on a CPU, where it is installed and has room in memory; else
    eager. Raises ValueError where what is asked for is not here.
    """
    there = importlib.util.find_spec("openvino") is not None
    if asked not in get_args(EngineName):
        raise ValueError(f"engine (={asked!r}) must be one of {', '.join(get_args(EngineName))}{nearest(str(asked), get_args(EngineName))}")
    match asked:
        case "auto":
            roomy = psutil.virtual_memory().available >= ROOM * parameters
            return "openvino" if there and device.type == "cpu" and dtype == torch.float32 and parameters >= LARGE and roomy else "eager"
        case "openvino" if not there:
            raise ValueError("engine (='openvino') needs the package openvino: pip install openvino, or take eager")
        case "openvino" if device.type != "cpu" or dtype != torch.float32:
            raise ValueError(
                f"engine (='openvino') computes in fp32 on a CPU, not in {str(dtype)[6:]} on {device.type}: take eager, or compile on a GPU"
            )
        case "compile" if device.type != "cuda":
            raise ValueError("engine (='compile') is for GPUs: on a CPU it takes minutes to begin and is slower afterwards; take openvino or eager")
    return asked


class Engine:
    """What computes some networks of one model, and whatever else is asked for as it is written: copies of them (averages), and those whose layers
    have hooks (changes that come and go). Every graph is of the weights that a network has when it is asked for. `willing`: where a graph cannot be
    had, or would have to be made of weights that were changed, it is done without.
    """

    def __init__(self, name: EngineName = "eager", networks: tuple[nn.Module, ...] = (), willing: bool = False) -> None:
        self.name, self.willing = name, willing
        self.own = {id(n): fingerprint(n) for n in networks} if name == "openvino" else {id(n): "" for n in networks}
        self.networks = networks  # whose ids are nobody else's as long as they are
        self.made: dict[tuple[int, str], Any] = {}
        self.asked: dict[tuple[int, str], Any] = {}  # the graphs of what was asked for last, None for what is as it is written

    def __deepcopy__(self, memo: Any) -> Engine:
        """A copy of a model is computed as it is written."""
        return Engine()

    def of(self, network: nn.Module, method: str = "forward", *, dynamic: bool = False) -> Callable[..., Any]:
        """What computes a method of a network that takes tensors and conditions. `dynamic`: one graph of it is right for any shape."""
        plain: Callable[..., Any] = network if method == "forward" else getattr(network, method)
        key = (id(network), method)
        if self.name == "eager":
            return plain
        self.asked[key] = None
        if id(network) not in self.own or hooked(network):
            return plain
        if self.name == "compile":
            if key not in self.made:
                self.made[key] = torch.compile(plain)
            return self.made[key]  # type: ignore[no-any-return]
        weights = fingerprint(network)
        if key not in self.made or self.made[key].weights != weights:
            self.made.pop(key, None)  # graphs of other weights are not held beside these
            changed = weights != self.own[id(network)]
            self.made[key] = Graphs(network, method, weights, dynamic, self.willing, makes=not (self.willing and changed))
        self.asked[key] = self.made[key]
        return self.made[key]  # type: ignore[no-any-return]

    @property
    def version(self) -> str:
        """What is to compute, with its version."""
        return f"openvino {importlib.metadata.version('openvino')}" if self.name == "openvino" else f"torch {torch.__version__}"

    @property
    def used(self) -> str:
        """What did compute, as a picture's record says it: OpenVINO where a graph was there for any part."""
        graphs = [g for g in self.asked.values() if g is not None]
        return self.version if self.name != "openvino" or any(g.used for g in graphs) else f"torch {torch.__version__}"


def fingerprint(network: nn.Module) -> str:
    """A hash of how a network is built and of numbers from the beginning, the middle and the end of each of its tensors."""
    digest = hashlib.sha256(repr(network).encode() + repr(getattr(network, "config", None)).encode())
    for name, v in (*network.named_parameters(), *network.named_buffers()):
        flat = v.detach().reshape(-1)
        middle = len(flat) // 2
        digest.update(f"{name} {v.dtype} {tuple(v.shape)}".encode())
        for part in (flat[:SAMPLED], flat[middle : middle + SAMPLED], flat[-SAMPLED:]):
            digest.update(part.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
    """Called like a method of a network, computes it by OpenVINO, with one graph for each shape; one caller after the other."""

    def __init__(self, network: nn.Module, method: str, weights: str, dynamic: bool, willing: bool = False, makes: bool = True) -> None:
        self.network, self.method, self.weights, self.dynamic = network, method, weights, dynamic
        self.willing, self.makes = willing, makes
        self.part: nn.Module = getattr(network, "decoder", network) if method == "decode" else network  # what computes it
        self.bytes = 4 * (sum(p.numel() for p in self.part.parameters()) + winograd.numbers(self.part))
        self.compiled: dict[Any, Any] = {}
        self.used = False
        self.lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, *args: Any) -> Any:
        x = args[0]
        alone = self.bytes > MOST_HELD // 4 or x.shape[-1] * x.shape[-2] >= ALONE
        if self.dynamic and len(x) > 1 and alone:
            parts = [self._run(row) for row in _rows(args)]
            return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts, strict=True)))
        return self._run(args)

    def _run(self, args: tuple[Any, ...]) -> Any:
        named = _leaves(args)
        key = (torch.get_num_threads(), *((name, tuple(v.shape), str(v.dtype)) for name, v in named))
        with self.lock:
            if key not in self.compiled:
                while self.compiled and self.bytes * (len(self.compiled) + 1) > MOST_HELD:
                    del self.compiled[next(iter(self.compiled))]
                self.compiled[key] = self._graph(args, named)
            request = self.compiled[key]
            self.used = request is not None
            if request is None:
                return getattr(self.network, self.method)(*args)
            return _answer(request, named)

    def _graph(self, args: tuple[Any, ...], named: list[tuple[str, Tensor]]) -> Any:
        """The graph for this shape, from the disk or made first; None where there is to be none."""
        folder = cache_folder() / "engine" / self._digest(named)
        try:
            if (folder / "graph.xml").exists():
                with suppress(OSError):
                    os.utime(folder)
                try:
                    return self._compile(folder, named)
                except RuntimeError:  # it was damaged, or removed just now
                    shutil.rmtree(folder, ignore_errors=True)
            return self._make(args, named, folder) if self.makes else None
        except FileError as e:
            if not self.willing:
                raise
            print(translated(f"note: {e}"), file=sys.stderr)
            self.makes = False
            return None

    def _compile(self, folder: Path, named: list[tuple[str, Tensor]]) -> Any:
        import openvino as ov

        core = ov.Core()
        model = core.read_model(folder / "graph.xml")
        model.reshape({port: list(v.shape) for port, (_, v) in zip(model.inputs, named, strict=True)})
        told = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1,
                "CACHE_DIR": str(folder / "compiled"), "CACHE_MODE": "OPTIMIZE_SIZE"}  # fmt: skip
        request = core.compile_model(model, "CPU", told).create_infer_request()
        hand_back(self.network, (folder / "graph.bin").resolve())
        return request

    def _digest(self, named: list[tuple[str, Tensor]]) -> str:
        made_by = [f"{p} {importlib.metadata.version(p)}" for p in ("openvino", "torch")] + [f"sfumato {sfumato.__version__}", winograd.MADE]
        shapes = [[name, v.ndim if self.dynamic else list(v.shape), str(v.dtype)] for name, v in named]
        return hashlib.sha256(json.dumps([self.weights, self.method, shapes, made_by]).encode()).hexdigest()[:32]

    def _make(self, args: tuple[Any, ...], named: list[tuple[str, Tensor]], folder: Path) -> Any:
        """Traces the method; its graph is on the disk when it was found to say what the network says, whole or not at all. Raises FileError."""
        began, large = time.perf_counter(), self.bytes > 4 * LARGE
        if large:
            print(translated(f"openvino: making a graph of {self.bytes / 1e9:.1f} GB, once; a minute or so"), file=sys.stderr)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if free_bytes(folder.parent) < 1.1 * self.bytes:
                raise FileError(
                    f"{folder.parent} has no room for the {self.bytes / 1e9:.1f} GB of a network's graph: free some, or take --engine eager"
                )
            part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".", suffix=".part"))
        except OSError as e:
            raise FileError(f"cannot write {folder}: {e.strerror or e}") from None
        try:
            self._trace(args, part)
            request = self._compile(part, named)
            self._check(request, args, named)
            hand_back(self.network)
            _make_room(folder.parent, MOST_KEPT - size_of(part))
            with suppress(OSError):  # another process was quicker
                part.rename(folder)
            if large:
                took = time.perf_counter() - began
                print(translated(f"openvino: made in {took:.0f} s, {size_of(folder) / 1e9:.1f} GB in {folder}"), file=sys.stderr)
            return request
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _trace(self, args: tuple[Any, ...], folder: Path) -> None:
        """Writes the graph. Raises FileError where OpenVINO has none for this network."""
        import openvino as ov
        from openvino.frontend import FrontEndManager, GeneralFailure, OpConversionFailure
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

        example, learning = self._small(args) if self.dynamic else args, self.network.training
        inputs = tuple(v for _, v in _leaves(example))
        try:
            with _silent(), winograd.given(self.part):  # by the frontend: openvino.convert_model tells others that it was called
                decoder = TorchScriptPythonDecoder(
                    _Traced(self.network, self.method, example).eval(), example_input=inputs, trace_kwargs={"check_trace": False}
                )
                frontend = FrontEndManager().load_by_framework("pytorch")
                ov.serialize(frontend.convert(frontend.load(decoder)), folder / "graph.xml", folder / "graph.bin")
        except (RuntimeError, GeneralFailure, OpConversionFailure) as e:
            raise FileError(f"openvino cannot compute this network: take --engine eager ({str(e).strip().splitlines()[-1][:200]})") from e
        finally:
            self.network.train(learning)
        for file in folder.glob("graph.*"):
            with file.open("rb+") as f:
                os.fsync(f.fileno())

    def _small(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same at a few cells: tracing is quick, and the graph is for any number of them."""
        cut = lambda v: v[..., :TRACE_SIDE, :TRACE_SIDE].contiguous() if v.ndim == 4 else v  # noqa: E731
        return tuple(cut(a) if isinstance(a, Tensor) else a.map(cut) for a in args)

    def _check(self, request: Any, args: tuple[Any, ...], named: list[tuple[str, Tensor]]) -> None:
        """Raises FileError where a new graph does not say what the network says."""
        with winograd.as_written():
            expected = getattr(self.network, self.method)(*args)
        found = _answer(request, named)
        for a, b in zip(*((v,) if isinstance(v, Tensor) else v for v in (expected, found)), strict=True):
            gap = float((a - b).abs().max() / a.abs().max().clamp_min(1e-6))
            if bool(a.isfinite().all()) and not gap <= FURTHEST:  # else the picture says that it is not finite
                raise FileError(f"openvino computes another result than the network (off by {gap:.1e}): take --engine eager, and please tell us")


def _answer(request: Any, named: list[tuple[str, Tensor]]) -> Any:
    """What a graph makes of tensors; in memory of its own, as the graph uses its own again."""
    out = request.infer([v.contiguous().numpy() for _, v in named], share_inputs=True, share_outputs=True)
    found = tuple(torch.from_numpy(v).clone() for v in out.values())
    return found if len(found) > 1 else found[0]


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
