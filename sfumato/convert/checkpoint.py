"""Reads the tensors of a foreign checkpoint without running anything that it holds.

A `.ckpt` is a zip with a pickle, and a pickle is a program. This reader knows a few names (how a tensor is put together, plain containers); every
other name becomes an empty shell, which is made, filled and thrown away: nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.convert.header import read_header
from sfumato.core.checkpoint import FileError, replacing

PIECE = 2**24  # bytes that are read at once
NESTED = 4  # state_dicts within each other
WITHIN = ("state_dict", "string_to_param")  # of checkpoints, and of learned words
DTYPES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip


class Shell(dict):
    """What stands for an object of a class that is not known; holds nothing that could act."""

    def __new__(cls, *args: Any, **named: Any) -> Shell:
        return super().__new__(cls)

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """As a list would."""

    def extend(self, items: Any) -> None:
        """As a list would."""

    def add(self, item: Any) -> None:
        """As a set would."""

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return torch.as_strided(storage, size, stride, offset)


def _parameter(data: Any, *_: Any) -> Any:
    return data


class Parameters(Shell):
    """What stands for torch's ParameterDict: its tensors by name."""

    def __setstate__(self, state: Any) -> None:
        held = state.get("_parameters") if isinstance(state, dict) else None
        if isinstance(held, dict):
            self.update({k: v for k, v in held.items() if isinstance(v, Tensor)})


class _Unpickler(pickle.Unpickler):
    """Names are looked up here and nowhere else."""

    KNOWN: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "Size"): tuple,
        ("torch.nn.modules.container", "ParameterDict"): Parameters,
    }

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, shapes: bool) -> None:
        super().__init__(file)
        self.archive, self.root, self.shapes = archive, root, shapes
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        return self.KNOWN.get((module, name), Shell)

    def persistent_load(self, told: Any) -> Tensor:
        _, dtype, key, _, _ = told
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        if key not in self.storages:
            self.storages[key] = _bytes(self.archive, f"{self.root}/data/{key}", self.shapes).view(dtype)
        return self.storages[key]


def _stored(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """A member of an archive. Raises UnpicklingError for a compressed one, which may be of any size: PyTorch writes none."""
    told = archive.getinfo(name)
    if told.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError(f"{name} is compressed, which PyTorch never writes")
    return told


def _bytes(archive: zipfile.ZipFile, name: str, shapes: bool = False) -> Tensor:
    """What a member holds, in memory once; with `shapes` only as many bytes, which are nowhere."""
    told = _stored(archive, name)
    if shapes:
        return torch.empty(told.file_size, dtype=torch.uint8, device="meta")
    found = torch.empty(told.file_size, dtype=torch.uint8)
    with archive.open(told) as file:
        filled, whole = 0, memoryview(found.numpy())
        while filled < len(whole) and (count := file.readinto(whole[filled : filled + PIECE])):  # type: ignore[attr-defined]
            filled += count
    if filled < told.file_size:
        raise pickle.UnpicklingError(f"{name} ends early")
    return found


def read_tensors(path: Path, shapes: bool = False) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file or of a PyTorch checkpoint, by name; nested `state_dict`s are unwrapped, whatever else it holds is left.
    `shapes`: of a pickle their shapes alone, on the device "meta".

    Raises FileError for what is neither, or is damaged.
    """
    if not path.is_file():
        raise FileError(f"there is no file {path}")
    whole = path.suffix == ".safetensors"
    if whole:
        read_header(path)
    try:
        if whole:
            return load_file(path)
        found = _unpickled(path, shapes) if zipfile.is_zipfile(path) else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        why = "it holds something else than tensors" if "eights only load" in str(e) else str(e).splitlines()[0][:200] if str(e) else type(e).__name__
        raise FileError(f"{path} cannot be read as a checkpoint ({why})") from None
    for _ in range(NESTED):
        inner = next((k for k in WITHIN if isinstance(found, dict) and isinstance(found.get(k), dict)), None)
        found = found if inner is None else found[inner]
    named = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, Tensor)} if isinstance(found, dict) else {}
    claimed = next((k for k, v in named.items() if v.numel() > v.untyped_storage().nbytes() // v.element_size()), None)
    if claimed:
        raise FileError(f"{path}: {claimed} says it has {named[claimed].numel():,} values, more than the file holds")
    tensors = _apart(named)
    if not tensors:
        raise FileError(f"{path} holds no tensors by name: it is no checkpoint of a network")
    return tensors


def write_tensors(tensors: dict[str, Tensor], path: Path, said: dict[str, str]) -> None:
    """A `.safetensors` file, whole or not at all. Raises FileError."""
    with replacing(path) as temporary:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, said)
        except SafetensorError as e:
            raise FileError(f"cannot write {path}: {e}") from None


def _apart(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, which only those that share theirs have to be copied to."""
    found, seen = {}, set()
    for name, v in named.items():
        memory = v.untyped_storage()
        alone = v.is_contiguous() and memory.nbytes() == v.nbytes and memory.data_ptr() not in seen
        seen.add(memory.data_ptr())
        found[name] = v.detach() if alone else v.detach().clone()
    return found


def check_fit(wanted: dict[str, Tensor], given: dict[str, Tensor], source: object) -> None:
    """Raises FileError where `given` are not the names and shapes of `wanted`."""
    missing, foreign = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    if missing or foreign:
        raise FileError(
            f"{source} does not fit: it lacks {len(missing)} tensors ({missing[:3]}) and has {len(foreign)} that belong nowhere ({foreign[:3]})"
        )
    if wrong := next((k for k, v in given.items() if v.shape != wanted[k].shape), None):
        raise FileError(f"{source}: {wrong} is {tuple(given[wrong].shape)}, not {tuple(wanted[wrong].shape)}")


def _unpickled(path: Path, shapes: bool) -> Any:
    with zipfile.ZipFile(path) as archive:
        member = next((n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")), None)
        if member is None:
            raise FileError("it is a zip without a PyTorch archive")
        with archive.open(_stored(archive, member)) as file:
            return _Unpickler(file, archive, member.split("/")[0], shapes).load()
