"""Files of tensors: safetensors only, never pickle; written beside their target and renamed, so that a reader sees all or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class FileError(ValueError):
    """A file that cannot be read or written; the message is meant for the user."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path in the target's folder; when the block succeeds it is synced and renamed over `path`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as e:
        raise FileError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def new_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A .npy file to be filled through a map. Its room is taken at once: a map into a full disk would end the process without a word."""
    from numpy.lib import format

    held = format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    return held


def sweep(folder: Path) -> None:
    """Removes what writes left in a folder that were killed half-way. Nobody else may be writing there."""
    for left in folder.glob(".*.part"):
        left.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """What is free on the disk where `path` is, or would be."""
    return shutil.disk_usage(_existing(path)).free


def size_of(folder: Path) -> int:
    """Bytes of all files in it; 0 where it is not."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def disk_of(path: Path) -> int:
    """A number of the disk where `path` is, or would be: the same for the same disk."""
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    return next(p for p in (path, *path.resolve().parents) if p.exists())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: object) -> None:
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, object]) -> None:
    """Writes tensors with JSON metadata. Every value of `metadata` is stored as JSON."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, {k: json.dumps(v, ensure_ascii=False) for k, v in metadata.items()})
        except SafetensorError as e:
            raise FileError(f"cannot write {path}: {e}") from None


def read_metadata(path: Path) -> dict[str, object]:
    """The metadata of a safetensors file, each value parsed as JSON."""
    with _opened(path, framework="np") as f:
        return _metadata(path, f)


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, object]]:
    """All tensors of a safetensors file and its metadata."""
    with _opened(path, framework="pt", device=device) as f:
        return {name: f.get_tensor(name) for name in f.keys()}, _metadata(path, f)  # noqa: SIM118


@contextmanager
def _opened(path: Path, **how: str) -> Iterator:
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a .safetensors file")
    if not path.exists():
        raise FileError(f"there is no file {path}")
    try:
        with safe_open(path, **how) as f:
            yield f
    except (SafetensorError, OSError) as e:
        raise FileError(f"{path} is not a readable safetensors file: {e}") from None


def _metadata(path: Path, f: object) -> dict[str, object]:
    raw = f.metadata() or {}  # type: ignore[attr-defined]
    try:
        return {k: json.loads(v) for k, v in raw.items()}
    except json.JSONDecodeError:
        return dict(raw)


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes in the order of the names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where derived data is kept: $SFUMATO_CACHE, else $XDG_CACHE_HOME/sfumato, else ~/.cache/sfumato."""
    named = os.environ.get("SFUMATO_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato"


def cached(path: Path, make: Callable[[], tuple[dict[str, Tensor], dict[str, object]]]) -> dict[str, Tensor]:
    """The tensors stored at `path`; made and stored first where absent or unreadable."""
    if path.exists():
        try:
            return load_tensors(path)[0]
        except FileError:
            path.unlink(missing_ok=True)
    tensors, metadata = make()
    save_tensors(path, tensors, metadata)
    return tensors


def thousands(images: int) -> str:
    """500000 -> "000500k", 320 -> "000000.320k": names that sort by time and do not collide."""
    return f"{images // 1000:06d}{f'.{images % 1000:03d}' if images % 1000 else ''}k"


def checkpoint_name(kind: str, images: int) -> str:
    return f"{kind}-{thousands(images)}.safetensors"


def checkpoints(run: Path, kind: str) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    found = {p: re.fullmatch(rf"{kind}-(\d+(\.\d+)?)k\.safetensors", p.name) for p in run.glob(f"{kind}-*k.safetensors")}
    return sorted((p for p, m in found.items() if m), key=lambda p: float(found[p][1]))
