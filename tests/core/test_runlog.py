from __future__ import annotations

from pathlib import Path

from sfumato.core.runlog import RunLog, read_log


def test_lines_are_appended_and_read_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run" / "log.jsonl")
    log.write(images=1, loss=0.5)
    log.write(images=2, loss=0.25)
    assert read_log(log.path) == [{"images": 1, "loss": 0.5}, {"images": 2, "loss": 0.25}]


def test_a_resume_drops_what_it_will_write_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    for images in (10, 20, 30):
        log.write(images=images)
    again = RunLog(log.path, images=20)
    again.write(images=30)
    assert [line["images"] for line in read_log(log.path)] == [10, 20, 30]


def test_a_new_run_starts_an_empty_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write(images=10)
    RunLog(log.path)
    assert read_log(log.path) == []


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"images": 1}\n{"images": 2, "lo')
    assert read_log(path) == [{"images": 1}]
    RunLog(path, images=2).write(images=3)
    assert [line["images"] for line in read_log(path)] == [1, 3]
