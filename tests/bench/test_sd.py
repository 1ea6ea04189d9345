from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import sd

pytest.importorskip("openvino")


@pytest.mark.slow
def test_quick_measures_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd.main(["--quick", "--only", "steps,pictures,memory", "--out", str(tmp_path), "--threads", "1"])
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{\n") :])
    claims = {c["name"]: c for c in found["claims"]}
    for name in ("ours", "ours, eager"):
        assert claims[f"{name}: furthest value from diffusers' picture, in [0, 1]"]["holds"]
    assert claims["low memory: furthest value from the picture without, in [0, 1]"]["holds"]
    assert sum(c["unit"] == "times" for c in found["claims"]) == 4 + 4 + 2
    assert all(s > 0 for part in found["details"]["steps"].values() for seconds in part.values() for s in seconds)
