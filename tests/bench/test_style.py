"""The bench of a style from ten drawings, with icons that are discs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import style

OTHERS = ("dog", "tiger", "pizza", "tomato", "tent", "violin", "whale", "zebra", "snail", "taxi", "lemon", "key")


@pytest.mark.slow
def test_it_runs(tmp_path: Path) -> None:
    disc = '<circle cx="24" cy="24" r="{}" fill="#{:06x}"/>'
    icons = {name: {"body": disc.format(8 + i % 16, i * 700_000)} for i, name in enumerate((*style.TEN, *OTHERS))}
    (tmp_path / "icons.json").write_text(json.dumps({"icons": icons}))
    found = style.run(style.Options(icons=tmp_path / "icons.json", out=tmp_path, threads=1, quick=True))
    assert len(found["claims"]) == 4
    assert set(found["details"]["rows"]) == {"before", "before, in the style that is changed", "after", "real drawings"}
    assert all(0 <= v <= 1 for row in found["details"]["rows"].values() for v in row.values())
    assert found["details"]["rows"]["real drawings"]["new style"] >= 0.5, "discs are easily told from emoji"
    assert (tmp_path / "quick" / "after.png").exists()
