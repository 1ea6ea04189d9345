"""`sfumato data`: what it says of a folder, and its exit status."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.apps.cli import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, list[str], str]:
    status = 0
    try:
        main(["data", *argv])
    except SystemExit as e:
        status = int(e.code or 0)
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "我的 图片"
    for i in range(20):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (40, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "ab"[i % 2] / f"{i:02}.png")
    (root / "a" / "00.txt").write_text("noise, the first")
    (root / "a" / "broken.jpg").write_bytes(b"<html>")
    return root


def test_check_names_what_is_bad(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, lines, err = run(capsys, "check", str(folder))
    assert status == 0
    assert lines[0] == "pictures: 20"
    assert "with a caption: 1" in lines
    assert "label folder: 2 values: a (10), b (10)" in lines
    assert lines[lines.index("bad: 1 (1 html)") + 1] == "  a/broken.jpg is a web page, not a picture: download it again"
    status, _, err = run(capsys, "check", str(folder), "--strict")
    assert status == 2
    assert "1 files of" in err
    assert err.strip().splitlines()[-1].startswith("sfumato: error: 1 files of")


def test_check_says_everything_before_it_refuses(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(25):
        (folder / f"x{i:02}.png").write_bytes(b"")
    status, lines, err = run(capsys, "check", str(folder))
    assert status == 2
    assert "26 of 46 files" in err
    assert "bad: 26 (25 empty, 1 html)" in lines
    assert "  and 6 more: --all names them" in lines
    _, lines, _ = run(capsys, "check", str(folder), "--all")
    assert "  x24.png is empty" in lines


def test_show_makes_a_sheet(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheet.png"
    status, lines, _ = run(capsys, "show", str(folder), "--out", str(out), "--count", "9", "--size", "32")
    assert status == 0
    assert lines[0] == "a/00.png\tnoise, the first\tfolder: a"
    assert lines[-1] == str(out)
    assert len(lines) == 10
    with Image.open(out) as sheet:
        assert sheet.size == (3 * 36 - 4, 3 * 36 - 4)
    status, _, err = run(capsys, "show", str(folder), "--out", str(out))
    assert status == 2
    assert "--force" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "must be one of check, show, shard"),
        (["chek", "x"], "did you mean 'check'?"),
        (["check", "/nowhere"], "there is no folder or zip /nowhere"),
        (["show", ".", "--count", "0"], "count (=0) must be between 1 and 1,024"),
        (["show", ".", "--size", "2"], "size (=2) must be between 8 and 1,024 pixels"),
    ],
)
def test_bad_input_gets_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, *argv)
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_shards_are_written_checked_and_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards"
    status, lines, err = run(capsys, "shard", str(folder), "--out", str(out), "--per-shard", "7")
    assert status == 0, err
    assert lines == ["left out: a/broken.jpg is a web page, not a picture: download it again", "20 pictures in 3 shards", str(out)]
    assert run(capsys, "check", str(out))[1][::2] == ["pictures: 20 in 3 shards", "bad: 0"]
    status, lines, _ = run(capsys, "show", str(out), "--out", str(tmp_path / "s.png"), "--count", "4", "--size", "16")
    assert status == 0
    assert len(lines) == 5
    status, _, err = run(capsys, "shard", str(folder), "--out", str(out))
    assert status == 2
    assert "--force" in err
