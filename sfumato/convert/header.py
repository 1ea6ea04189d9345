"""What a safetensors file says it holds, read without its tensors, and believed only as far as the file bears it out.

The format: eight bytes with the header's length, a JSON object {name: {dtype, shape, data_offsets}}, the data, nothing between and nothing after.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from sfumato.core.checkpoint import FileError

MOST_BYTES, MOST_TENSORS, LONGEST_NAME, MOST_SIDES = 100_000_000, 100_000, 512, 8
SIZES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1,
    "F8_E5M2": 1,
}  # fmt: skip
ABOUT = "__metadata__"


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """({name: dtype and shape}, metadata). Raises FileError with the first thing that is not as it must be."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise FileError(f"{path} is no safetensors file, or was cut off: its header would be {length:,} bytes of {size:,}")
            if length > MOST_BYTES:
                raise FileError(f"{path} has a header of {length:,} bytes: at most {MOST_BYTES:,} are read")
            raw = file.read(length)
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}") from None
    found = _parsed(raw, path)
    about = found.pop(ABOUT, {})
    if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
        raise FileError(f"{path} has metadata that is not text by name")
    if len(found) > MOST_TENSORS:
        raise FileError(f"{path} says it holds {len(found):,} tensors: at most {MOST_TENSORS:,} are read")
    spans = {name: _span(name, told, path) for name, told in found.items()}
    _covered(spans, size - 8 - length, path)
    return {name: entry for name, (entry, _, _) in spans.items()}, about


def _parsed(raw: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise FileError(f"{path} names {name!r} twice in its header")
            found[name] = value
        return found

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=lambda c: math.nan)
    except FileError:
        raise
    except (UnicodeDecodeError, ValueError, RecursionError) as e:
        raise FileError(f"{path} is no safetensors file: its header is no JSON ({type(e).__name__})") from None
    if not isinstance(found, dict):
        raise FileError(f"{path} must have a JSON object as its header, not a {type(found).__name__}")
    return found


def _span(name: str, told: Any, path: Path) -> tuple[Entry, int, int]:
    """What is said of a tensor, and where its bytes begin and end."""
    short = f"{name[:60]!r}"
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        raise FileError(f"{path} has a tensor whose name ({short}) is empty, too long or not printable")
    if name.startswith(("/", "\\")) or ".." in name or "\\" in name or ":" in name:
        raise FileError(f"{path} has a tensor whose name ({short}) is a path")
    if not isinstance(told, dict) or told.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileError(f"{path} does not say dtype, shape and data_offsets of {short}, and those alone")
    dtype, shape, at = told["dtype"], told["shape"], told["data_offsets"]
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise FileError(f"{path} has {short} in the dtype {dtype!r}: {', '.join(SIZES)} are known")
    if not _counts(shape) or len(shape) > MOST_SIDES:
        raise FileError(f"{path} has {short} of the shape {str(shape)[:60]}: at most {MOST_SIDES} whole numbers from 0 on are allowed")
    if not _counts(at) or len(at) != 2 or at[1] - at[0] != math.prod(shape) * SIZES[dtype]:
        raise FileError(f"{path} has {short} from and to {str(at)[:60]}, which is not what {dtype} of {str(shape)[:60]} takes")
    return Entry(dtype, tuple(shape)), at[0], at[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**48 for v in values)


def _covered(spans: dict[str, tuple[Entry, int, int]], size: int, path: Path) -> None:
    """Every byte of the data belongs to one tensor."""
    end = 0
    for name, (_, start, stop) in sorted(spans.items(), key=lambda item: item[1][1:]):
        if start != end:
            raise FileError(f"{path} has {name[:60]!r} {'over others' if start < end else 'after a gap'}: at byte {start:,} instead of {end:,}")
        end = stop
    if end != size:
        raise FileError(f"{path} has {size:,} bytes of data where its header says {end:,}: it was cut off, or something is hidden after it")
