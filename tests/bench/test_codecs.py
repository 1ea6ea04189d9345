from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import quantizer
import vqgan


def test_quick_lookups_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    quantizer.main(["--quick"])
    found = json.loads(capsys.readouterr().out)
    by_name = {c["name"]: c for c in found["claims"]}
    assert by_name["equal indices, at least"]["value"] == 1
    assert by_name["squared distance above the fp64 minimum, relative, at most"]["holds"]
    assert set(found["details"]["dim 8"]["seconds"]) == set(quantizer.WAYS)


def test_quick_compares_codecs_and_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vqgan.main(["--quick", "--out", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    assert set(found["details"]["codecs"]) == {"preset vqvae", "fsq", "preset vqgan"}
    assert found["details"]["pictures"]["rows"] == ["originals", "preset vqvae", "preset vqgan"]
    assert {"codebook.png", "reconstructions.png"} <= {p.name for p in (tmp_path / "bench-vqgan-quick").iterdir()}
    assert all(len(v["kid"]) == 3 for v in found["details"]["codecs"].values())
    assert {"Ours", "Taming"} == set(found["details"]["step"]["f16, 1,024 codes"])


def test_fashion_is_read_from_its_files(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(bytes(16) + bytes(range(256)) * 49)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(bytes(8) + bytes([3] * 16))
    out = vqgan.idx_folder(tmp_path, tmp_path / "out", 4)
    assert len(list(out.rglob("*.png"))) == 4
    assert [p.name for p in out.iterdir()] == ["3"]
