"""What a training run writes down: one JSON object a line, flushed as it goes."""

from __future__ import annotations

import json
from pathlib import Path

from sfumato.core.checkpoint import write_bytes


class RunLog:
    """Appends to `log.jsonl`. After a resume the lines beyond `images` are dropped, so that the log tells one story."""

    def __init__(self, path: Path, images: int = 0) -> None:
        self.path = path
        kept = [line for line in read_log(path) if line.get("images", 0) <= images] if path.exists() else []
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, **values: object) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log; a last line that was cut off is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def is_out_of_memory(e: BaseException) -> bool:
    """Whether an error says that memory ran out, of the host or of a GPU; told by name, so that torch need not be there."""
    cpu = isinstance(e, RuntimeError) and "DefaultCPUAllocator" in str(e)
    return isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError" or cpu
