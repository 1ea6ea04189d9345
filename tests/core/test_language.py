"""What sfumato says in Chinese: every sentence that a user may meet is in the catalogue, and says the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.apps import ask, cli, codecs, dataset, draw, evaluation, lora, together, training
from sfumato.core.language import catalogue, language, translated

PACKAGE = Path(cli.__file__).parents[1]
SPOKEN = {"ValueError", "FileError", "SecondStageError", "Unreadable", "Bad", "Diverged", "say", "translated"}
FOR_PROGRAMMERS = ("codecs", "diffusion", "losses", "nn", "priors")  # what they raise is met in Python, by those who write it
STRUCTURE = re.compile(r"[\s:,;.(){}=/'…-]*(sfumato)?[\s:,;.(){}=/'…-]*")


def template(node: ast.expr) -> str | None:
    """A text, or an f-string with its values as gaps."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            a, b = template(left), template(right)
            return None if a is None or b is None else a + b
    return None


def sentences() -> Iterator[tuple[str, str]]:
    """(sentence, where) of all that is raised or said."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] in FOR_PROGRAMMERS and path.name != "engine.py":  # which is a flag
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in SPOKEN:
                for said in map(template, node.args):
                    if said and " " in said:
                        yield said.removeprefix("warning: ").removeprefix("note: "), f"{path.relative_to(PACKAGE)}:{node.lineno}"


def filled(sentence: str) -> str:
    """A sentence as it is said, with a word in every gap."""
    return re.sub(r"\{\}", "X7", sentence)


@pytest.fixture
def chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFUMATO_LANG", "zh")


@pytest.mark.usefixtures("chinese")
def test_every_sentence_that_is_raised_or_said_is_in_the_catalogue() -> None:
    missing = [f"{where}: {s}" for s, where in sentences() if not STRUCTURE.fullmatch(s) and translated(filled(s)) == filled(s)]
    assert missing == []


@pytest.mark.usefixtures("chinese")
def test_every_flag_and_command_is_explained() -> None:
    kinds = [
        draw.Generate,
        dataset.Check,
        dataset.Show,
        dataset.Shard,
        training.Pack,
        together.All,
        evaluation.Evaluate,
        evaluation.Compare,
        codecs.Sample,
        codecs.Convert,
        codecs.Doctor,
        *(kind for kind, _ in (*ask.QUESTIONS.values(), *lora.ACTIONS.values())),
    ]
    presets = [p.__doc__ or "" for what in training.WHAT[1:] for p in training._presets(what).values()]
    texts = [
        cli.HELP,
        training.USAGE,
        *training.HELPS.values(),
        *training.OF_TUNED.values(),
        *(p.splitlines()[0] for p in presets),
        *(h for k in kinds for h in cli._field_helps(k).values()),
        *((k.__doc__ or "").split("\n\n")[0] for k in kinds),
    ]
    assert [t for t in texts if translated(t) == t] == []


def test_gaps_are_numbered_and_none_is_lost() -> None:
    for english, zh in catalogue().items():
        gaps = english.count("{}")
        used = {int(n) for n in re.findall(r"\{(\d)\}", zh)}
        assert used <= set(range(gaps)), english
        assert len(used) >= gaps - english.count("process{}"), english
        assert re.search(r"[\u4e00-\u9fff]", zh) or not re.search("[a-z]{4}", re.sub(r"\{\}|sfumato|MB", "", english)), english


def test_no_sentence_is_left_over() -> None:
    """What the code no longer says has no place in the catalogue."""
    source = " ".join(p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py"))
    joined = re.sub(r"""["']\s*f?["']""", "", source)  # sentences that go over several lines
    known = re.sub(r"[\"'\\\s]+", "", joined)
    tyros = ("Unrecognized options", "Error parsing", "Missing from", "Missing value", "invalid choice", "show this help")
    left = [e for e in catalogue() if not e.startswith(tyros) and any(re.sub(r"[\"'\\\s]+", "", p) not in known for p in e.split("{}"))]
    assert left == []


@pytest.mark.usefixtures("chinese")
@pytest.mark.parametrize(
    ("english", "zh"),
    [
        (
            "sfumato: error: style (='notto') must be one of noto, did you mean 'noto'?",
            "sfumato：错误：style（='notto'）必须是 noto 之一，是否想写 'noto'？",
        ),
        ("warning: my cat.png is empty", "警告：my cat.png 是空的"),
        ("note: 'zebra' is not a word this model knows; near: cat, dog", "注意：模型不认识 'zebra'；相近的有：cat, dog"),
        ("a sentence that nobody knows", "a sentence that nobody knows"),
        ("", ""),
    ],
)
def test_sentences_inside_sentences(english: str, zh: str) -> None:
    assert translated(english) == zh


@given(st.text(max_size=300))
def test_any_text_can_be_asked_for(text: str) -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("SFUMATO_LANG", "zh")
        assert all(c in translated(text) for c in re.findall("[0-9]", text)), "no value is lost"
        m.setenv("SFUMATO_LANG", "en")
        assert translated(text) == text


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SFUMATO_LANG": "zh"}, "zh"),
        ({"SFUMATO_LANG": "en", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "zh_TW.UTF-8"}, "zh"),
        ({"LC_ALL": "de_DE.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LANG": "C.UTF-8"}, "en"),
    ],
)
def test_the_language_of_the_reader(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SFUMATO_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language() == expected


@pytest.mark.usefixtures("chinese")
def test_the_command_line_speaks_chinese(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, status, said in (
        (["--help"], 0, "用法：sfumato 命令"),
        (["generate", "--help"], 0, "一种风格，或几种的份额"),
        (["data", "show", "--help"], 0, " 位置参数\n"),
        (["train", "text", "--help"], 0, "训练："),
        (["train", "al"], 2, "是否想写 'all'"),
        (["generate", "--stepz", "3"], 2, "不认识的选项：--stepz, 3，是否想写 --steps？（参见 sfumato generate --help）"),
        (["data", "check", str(tmp_path / "没有 这个")], 2, f"错误：没有文件夹或 zip {tmp_path / '没有 这个'}"),
        (["generate", "猫", "--steps", "0"], 2, "steps（=0）必须在 1 与"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert (stopped.value.code or 0) == status
        out, err = capsys.readouterr()
        assert said in (err if status else out)
        assert status == 0 or err.count("\n") == 1
