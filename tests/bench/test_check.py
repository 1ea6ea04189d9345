from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
import check


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    capsys.readouterr()
    check.main(list(argv))
    out = capsys.readouterr().out
    return json.loads(out[out.index("{\n") :])["claims"][0]  # type: ignore[no-any-return]


def test_what_became_slower_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of seconds that are said, not measured."""
    took = [0.02]
    monkeypatch.setattr(check, "KNOWN", tmp_path / "check.json")
    monkeypatch.setattr(check, "seconds", lambda work: work())
    monkeypatch.setattr(check, "fixed", lambda: lambda: 0.01)
    monkeypatch.setattr(check, "works", lambda: {"work": lambda: took[0]})
    with pytest.raises(SystemExit, match="nothing is known of this kind of CPU"):
        check.main([])
    with pytest.raises(SystemExit, match="must be at least 9"):
        check.main(["--pairs", "8"])
    run(capsys, "--write")
    assert run(capsys)["value"] == 1
    took[0] = 0.0208
    assert run(capsys)["holds"] is True
    took[0] = 0.0212
    with pytest.raises(SystemExit, match="1"):
        check.main([])


@pytest.mark.slow
def test_quick_runs_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(check, "KNOWN", tmp_path / "check.json")
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path))
    assert run(capsys, "--quick")["goal"] is None
