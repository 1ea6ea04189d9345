from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import stable


def test_quick_draws_the_same_by_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stable.main(["--quick", "--steps", "2", "--side", "64", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    claims = {c["name"]: c for c in found["claims"]}
    assert claims["picture beside that of diffusers, in [0, 1]: furthest value"]["holds"]
    assert claims["tensors that differ after single file and folder again"]["value"] == 0
    assert {"ours, folder", "ours, single file", "ours, pickle", "diffusers, folder"} <= set(found["details"]["work"])
