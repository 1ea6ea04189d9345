"""sfumato: generative art in one toolkit. `sfumato.load().generate("a cat", style="noto", seed=7)` draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sfumato.pipelines.load import load as load


def __getattr__(name: str) -> Any:
    if name == "load":
        from sfumato.pipelines.load import load

        return load
    raise AttributeError(f"module 'sfumato' has no attribute '{name}'")
