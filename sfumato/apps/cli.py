"""The command line. What takes long to import is imported when a command runs."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import sfumato
from sfumato.core.language import language, translated
from sfumato.core.runlog import is_out_of_memory

OUT = Path("sfumato-out")  # where results go that have no name

HELP = """usage: sfumato COMMAND ...

Pictures from words, and the models behind them.

  generate PROMPT ...   draw pictures:  sfumato generate "a cat" --style noto --seed 7 --out cat.png
  styles                the styles that the model knows
  concepts [WORD]       the things that it knows, or those near a word
  models                the models that come with this installation
  info FILE             what a model, a run folder or one of our pictures is
  credits [FILE]        whose works a model learned from, with their licences
  paths                 where things are kept, and how to be rid of them
  data check DIR        what a folder of one's own pictures is good for; also data show DIR, data shard DIR --out SHARDS
  train WHAT ...        train an autoencoder, text encoder, diffusion model, prior or GAN; train all --data DIR: everything on your own pictures;
                        train lora, embedding, finetune --data DIR: what a model that is there learns of some pictures
  doctor RUN            what is wrong with a run of train autoencoder or gan, and what helps
  sample RUN            draw from a VAE, or go from one picture to another in a codec's latents
  lora WHAT ...         merge LoRAs into a model, extract one from how two models differ, or say what one is (info)
  convert FILE OUT      a VQGAN of taming-transformers or diffusers into a model of ours, and back with --to
  pack RUN              make one small file that draws from a finished run
  evaluate WHAT ...     measure a model or a folder of samples:  sfumato evaluate emoji --reference emoji --out report
  compare A B ...       put reports side by side and say which differences are real

sfumato COMMAND --help says more. --version prints the version."""


def say(text: str) -> None:
    """A remark for people, on stderr, so that stdout holds results only."""
    print(translated(text), file=sys.stderr)


def generate(argv: list[str]) -> None:
    """Draws pictures."""
    import tyro

    from sfumato.apps.draw import Generate, run

    run(parse(tyro, Generate, argv, "generate"))


def _ask(name: str) -> Callable[[list[str]], None]:
    def run(argv: list[str]) -> None:
        import tyro

        from sfumato.apps import ask

        kind, answer = ask.QUESTIONS[name]
        for line in answer(parse(tyro, kind, argv, name)):
            print(line)

    return run


def asked_how(command: str, known: Collection[str], argv: list[str], usage: str) -> bool:
    """Whether a command's usage was asked for, which is printed. Raises ValueError where its first word is none of those that it knows."""
    given = argv[0] if argv else ""
    if given in known:
        return False
    if given in ("-h", "--help"):
        print(translated(usage))
        return True
    from sfumato.core.config import nearest

    raise ValueError(f"{command} what? (={given!r}) must be one of {', '.join(known)}{nearest(given, known)}")


def data(argv: list[str]) -> None:
    """Says what a folder of pictures is good for."""
    import tyro

    from sfumato.apps import dataset

    known = {
        "check": (dataset.Check, dataset.run_check),
        "show": (dataset.Show, dataset.run_show),
        "shard": (dataset.Shard, dataset.run_shard),
    }
    if asked_how("data", known, argv, "usage: sfumato data {check,show,shard} DIR ..."):
        return
    kind, answer = known[argv[0]]
    for line in answer(parse(tyro, kind, argv[1:], f"data {argv[0]}")):
        print(line if argv[0] == "show" else translated(line))


def lora(argv: list[str]) -> None:
    """Merges, extracts, or says what it is."""
    import tyro

    from sfumato.apps.lora import ACTIONS

    if asked_how("lora", ACTIONS, argv, "usage: sfumato lora {info,merge,extract} ..."):
        return
    kind, answer = ACTIONS[argv[0]]
    for line in answer(parse(tyro, kind, argv[1:], f"lora {argv[0]}")):
        print(translated(line))


def train(argv: list[str]) -> None:
    """Trains one part of a model."""
    from sfumato.apps.training import train as run

    run(argv)


def pack(argv: list[str]) -> None:
    """Makes a small file that draws from a run."""
    import tyro

    from sfumato.apps.training import Pack, pack_run

    print(pack_run(parse(tyro, Pack, argv, "pack")))


def _measure(name: str) -> Callable[[list[str]], None]:
    def run(argv: list[str]) -> None:
        import tyro

        from sfumato.apps import evaluation

        kinds = {"evaluate": (evaluation.Evaluate, evaluation.run_evaluate), "compare": (evaluation.Compare, evaluation.run_compare)}
        kind, answer = kinds[name]
        for line in answer(parse(tyro, kind, argv, name)):
            print(line)

    return run


def _of_codecs(name: str) -> Callable[[list[str]], None]:
    def run(argv: list[str]) -> None:
        import tyro

        from sfumato.apps import codecs

        kinds = {
            "sample": (codecs.Sample, codecs.run_sample),
            "convert": (codecs.Convert, codecs.run_convert),
            "doctor": (codecs.Doctor, codecs.run_doctor),
        }
        kind, answer = kinds[name]
        for line in answer(parse(tyro, kind, argv, name)):
            print(line)

    return run


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "generate": generate,
    **{name: _ask(name) for name in ("styles", "concepts", "models", "info", "credits", "paths")},
    "data": data,
    "train": train,
    "lora": lora,
    "pack": pack,
    **{name: _of_codecs(name) for name in ("doctor", "sample", "convert")},
    **{name: _measure(name) for name in ("evaluate", "compare")},
}


def parse(tyro: Any, kind: type, argv: list[str], command: str) -> Any:
    """tyro's parse of `kind`; its boxed errors become one line."""
    words, helped = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.nullcontext() if language() == "en" else contextlib.redirect_stdout(helped):
            return tyro.cli(as_shown(tyro, kind), args=argv, prog=f"sfumato {command}")
    except SystemExit as e:
        if not e.code:
            print(_chinese_help(helped.getvalue()), end="")
            raise
        raise ValueError(f"{_plainly(_one_line(words.getvalue()))} (see sfumato {command} --help)") from None


def as_shown(tyro: Any, kind: type) -> type:
    """A dataclass with the fields of `kind` whose help is in the reader's language, and speaks of STR where a str may be left out."""
    hints, bare, helps = typing.get_type_hints(kind, include_extras=True), typing.get_type_hints(kind), _field_helps(kind)

    def annotated(f: dataclasses.Field) -> Any:
        told: dict[str, Any] = {"help": translated(helps[f.name])} if f.name in helps else {}
        wanted = [t for t in typing.get_args(bare[f.name]) if t is not type(None)]
        if f.default is None and len(wanted) == 1 and wanted[0] in (str, int, float, Path):
            told |= {"metavar": wanted[0].__name__.upper(), "help_behavior_hint": ""}
        if f.default == ():
            told |= {"metavar": f"[{f.name.upper().removesuffix('S')} ...]", "help_behavior_hint": ""}
        return typing.Annotated[hints[f.name], tyro.conf.arg(**told)] if told else hints[f.name]

    def like(f: dataclasses.Field) -> dataclasses.Field:
        return dataclasses.field(default=f.default, default_factory=f.default_factory)  # type: ignore[arg-type, return-value]

    made = dataclasses.make_dataclass(kind.__name__, [(f.name, annotated(f), like(f)) for f in dataclasses.fields(kind)], frozen=True)
    doc = kind.__doc__ or ""
    made.__doc__ = doc if language() == "en" else translated(doc.split("\n\n")[0])
    return made


def _field_helps(kind: type) -> dict[str, str]:
    """The strings below the fields of a dataclass, or what it says of them itself; none where its source cannot be read."""
    if said := vars(kind).get("helps"):
        return said  # type: ignore[no-any-return]
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return {}
    pairs = itertools.pairwise(body)
    return {a.target.id: b.value.value for a, b in pairs if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}  # type: ignore[union-attr, attr-defined]


HEADINGS = {
    "usage: ": "用法：",
    "\n positional arguments\n": "\n 位置参数\n",
    "\n options\n": "\n 选项\n",
    "show this help message and exit": "显示本帮助并退出",
    "(required)": "（必填）",
}


def _chinese_help(text: str) -> str:
    """tyro's own words in a help; it draws no frames into a text, so nothing has to stand in columns."""
    text = re.sub(r" +$", "", text, flags=re.MULTILINE)
    for english, chinese in HEADINGS.items():
        text = text.replace(english, chinese)
    return re.sub(r" ?\(default: (.*)\)$", r"（默认：\1）", text, flags=re.MULTILINE)


def _one_line(box: str) -> str:
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()]
    body = [line for line in lines[1:] if line.strip("-")]
    kept: list[str] = []
    for line in body:
        if line.startswith(("For full helptext", "Argument helptext", "Got errors")):
            break
        kept.append("did you mean" if line.startswith("Perhaps you meant") else line)
        if len(kept) > 1 and kept[-2] == "did you mean":
            kept[-1] = re.split(r"[ ,]", line)[0] + "?"
            break
    return " ".join(kept)


WRONG_KIND = (  # tyro's words for a value of the wrong kind: flag, kind, value
    re.compile(r"Error parsing (?P<flag>--\S+): .*?(?P<kind>INT|FLOAT)\b.*\[(?P<value>.*)\]"),
    re.compile(r"Error parsing (?P<flag>--\S+): invalid literal for (?P<kind>int).*: (?P<value>'.*')"),
    re.compile(r"Error parsing (?P<flag>--\S+): could not convert string to (?P<kind>float): (?P<value>'.*')"),
)


def _plainly(line: str) -> str:
    """tyro's words for a value of the wrong kind, in ours."""
    found = next((m for pattern in WRONG_KIND if (m := pattern.match(line))), None)
    if found is None:
        return line
    return f"{found['flag']} (={found['value']}) must be {'a whole number' if found['kind'].lower() == 'int' else 'a number'}"


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Errors a user can cause are one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe on Windows may not be able to write Chinese otherwise
            stream.reconfigure(encoding="utf-8", errors="replace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(translated(HELP))
        raise SystemExit(0 if argv else 2)
    if argv[0] in ("--version", "-V"):
        print(f"sfumato {sfumato.__version__}")
        return
    try:
        if argv[0] not in COMMANDS:
            from sfumato.core.config import nearest

            raise ValueError(f"command (={argv[0]!r}) must be one of {', '.join(COMMANDS)}{nearest(argv[0], COMMANDS)}")
        COMMANDS[argv[0]](argv[1:])
    except KeyboardInterrupt:
        say("sfumato: interrupted")
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None
    except Exception as e:
        status = _status(e)
        if status is None:
            raise
        say(f"sfumato: {_message(e)}")
        raise SystemExit(status) from None


def _message(e: Exception) -> str:
    if is_out_of_memory(e):
        return "error: out of memory: ask for fewer pictures at once, a smaller batch_size or more accumulate"
    if isinstance(e, OSError) and e.strerror:
        return f"error: {e.filename or 'a file'}: {e.strerror}"
    first = " ".join(str(e).split())
    return first if type(e).__name__ == "Stopped" else f"error: {first}"


def _status(e: Exception) -> int | None:
    """The exit status for an error of the user's or the machine's making; None for our own bugs, which keep their traceback."""
    if type(e).__name__ == "Stopped":
        return 128 + e.signum  # type: ignore[attr-defined]
    return 2 if isinstance(e, (ValueError, OSError)) or type(e).__name__ == "Diverged" or is_out_of_memory(e) else None


if __name__ == "__main__":
    main()
