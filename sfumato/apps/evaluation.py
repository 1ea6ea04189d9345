"""`sfumato evaluate` and `sfumato compare`: what a model or a folder of samples is worth, and which differences are real."""

from __future__ import annotations

import html
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from sfumato.apps.cli import say
from sfumato.apps.draw import check_targets
from sfumato.core.checkpoint import FileError, write_bytes
from sfumato.core.report import page, plain, shown
from sfumato.core.request import Device

SIDE = 64  # pixels at which folders are compared, unless it is said


@dataclass(frozen=True)
class Evaluate:
    """Measures a model, or a folder of samples, against reference pictures, and writes a report that can be read and looked at."""

    subject: Annotated[str, tyro.conf.Positional]
    """A model file, a run folder, a bundled name, or a folder or zip of pictures."""
    reference: str
    """A folder, zip or shards of pictures to compare with, or "emoji", the embedded drawings."""
    metrics: str = "all"
    """all, or some of: pairwise, distribution, diversity, memorisation, stability, text, cost (with commas)."""
    out: Path = Path("report")
    """The folder of the report: index.html, report.json, values.json."""
    count: int = 0
    """Samples; 0: as many as there are reference pictures, at most 2,048. Of a model some 10 minutes on two cores, with 64 about two."""
    size: int = 0
    """Pixels of a side; 0: the model's own, 64 for folders."""
    features: Literal["lite0", "inception", "clip", "dinov2"] = "lite0"
    """The network that looks at pictures. Only inception gives what is called FID and IS."""
    features_path: str | None = None
    """Its file (inception), or the name or folder of its model (clip, dinov2)."""
    judge: str | None = None
    """A run folder or model of `sfumato train judge`, which then names class and style of what was drawn."""
    lpips: Path | None = None
    """A torchvision checkpoint of AlexNet, VGG-16 or SqueezeNet 1.1 for LPIPS; without it one that torch has downloaded before."""
    resize: Literal["antialias", "bicubic", "legacy-bilinear", "legacy-tf", "nearest"] = "antialias"
    """How pictures are resized for that network; the legacy ones are for comparing with figures that were made with them."""
    steps: int | None = None
    """Steps of a generator; without it what it usually takes."""
    guidance: float = 3.0
    """Guidance of a generator."""
    seed: int = 0
    repeats: int = 5
    """Seeds that stability is measured over."""
    keep: Path | None = None
    """A folder to write the samples into; without it they are not kept."""
    device: Device = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves the choice to torch."""
    force: bool = False
    """Overwrite a report that exists."""


@dataclass(frozen=True)
class Compare:
    """Puts reports of `sfumato evaluate` side by side and says which differences are real."""

    reports: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of reports; differences are to the first."""
    out: Path | None = None
    """An HTML file to write the table into."""
    spread: bool = False
    """The reports are of one thing over several seeds, of a training too: say how far every figure moves."""
    force: bool = False
    """Overwrite a file that exists."""


def run_evaluate(asked: Evaluate) -> Iterator[str]:
    """The lines to print: figures with their intervals, then where the report is."""
    if (asked.out / "report.json").exists() and not asked.force:
        raise FileError(f"{asked.out} holds a report already: use --force to overwrite it, or another --out")
    if asked.count < 0:
        raise ValueError(f"count (={asked.count}) must be at least 2, or 0 for as many as there are reference pictures")
    if asked.size < 0:
        raise ValueError(f"size (={asked.size}) must be at least 1, or 0 for the model's own")
    if asked.repeats < 2:
        raise ValueError(f"repeats (={asked.repeats}) must be at least 2: a spread needs two")
    check_targets([asked.out / "report.json"], force=True)  # better refused now than after everything was drawn
    from sfumato.metrics.features import feature_net
    from sfumato.nn.lpips import lpips_from
    from sfumato.pipelines import evaluate as work
    from sfumato.pipelines.load import choose_device, load_judge

    groups = work.GROUPS if asked.metrics == "all" else tuple(g.strip() for g in asked.metrics.split(","))
    options = work.Options(
        groups=groups, count=asked.count, resize=asked.resize, steps=asked.steps, guidance=asked.guidance, seed=asked.seed, repeats=asked.repeats,
        command=shlex.join(["sfumato", *sys.argv[1:]]), keep=asked.keep,
    )  # fmt: skip
    net = feature_net(asked.features, asked.features_path, str(choose_device(asked.device)))
    judge, lpips = None if asked.judge is None else load_judge(asked.judge), lpips_from(asked.lpips)
    subject, name, side, known = _subject(asked)
    reference = work.picture_set(asked.reference, side, known)
    for part in (reference, subject):
        for bad in getattr(part, "skipped", ())[:3]:
            say(f"warning: {bad}")
    report, found = work.evaluate(subject, name, reference, net, options, judge=judge, lpips=lpips, trained=_training_speed(Path(asked.subject)))
    written = work.save(report, found, asked.out)
    for remark in report.remarks:
        say(f"remark: {remark}")
    yield from lines(report.figures)
    yield str(written[-1])
    if found.stopped:
        raise KeyboardInterrupt  # what was seen is written; the exit status says that it is not all


def _subject(asked: Evaluate) -> tuple[Any, str, int, set[str] | None]:
    """(model or pictures, its name, the side to compare at, the concepts that it knows)."""
    from sfumato.pipelines.evaluate import picture_set
    from sfumato.pipelines.find import bundled
    from sfumato.pipelines.load import load

    path = Path(asked.subject)
    if not path.exists() and asked.subject not in bundled():
        raise FileError(f"there is no model, folder or zip {asked.subject}; bundled models: {', '.join(bundled())}")
    pictures = path.suffix.lower() in (".zip", ".tar") or (path.is_dir() and not any(path.glob("model-*.safetensors")))
    if pictures and asked.subject not in bundled():
        side = asked.size or SIDE
        return picture_set(asked.subject, side), asked.subject, side, None
    model = load(asked.subject, device=asked.device, threads=asked.threads)
    if asked.size not in (0, model.size):
        raise ValueError(f"size (={asked.size}) must be {model.size}, at which {model.name} draws, or left out")
    return model, model.name, model.size, set(model.meta["words"])


def _training_speed(run: Path) -> float | None:
    """Pictures a second that a run folder was trained with: the median of its log; None where it is none."""
    from sfumato.core.runlog import read_log

    found = [line["images_per_s"] for line in read_log(run / "log.jsonl") if "images_per_s" in line] if (run / "log.jsonl").exists() else []
    return float(np.median(found)) if found else None


def lines(figures: Any) -> Iterator[str]:
    """Figures as aligned text."""
    width = max((len(f.name) for f in figures), default=0)
    group = None
    for f in figures:
        if f.group != group:
            group = f.group
            yield f"[{group}]"
        between = f"  [{shown(f.interval[0])}, {shown(f.interval[1])}]" if f.interval else ""
        yield f"  {f.name:{width}}  {shown(f.value, f.unit)}{between}" + (f"  ({f.note})" if f.note else "")


# --- comparing ----------------------------------------------------------------------------------------------------------------------------------


def run_compare(asked: Compare) -> Iterator[str]:
    """A table: each figure of each report, and of every other report whether it differs from the first."""
    if len(asked.reports) < 2:
        raise ValueError(f"compare needs two reports at least, not {len(asked.reports)}: name their folders")
    if asked.out is not None and not asked.spread:
        check_targets([asked.out], asked.force)
    loaded = [_load(p) for p in asked.reports]
    names = [str(p) for p in asked.reports]
    warnings = list(unlike(loaded, names))
    yield from warnings
    if asked.spread:
        if asked.out is not None:
            say("warning: out has no effect together with spread")
        yield from spread_lines(loaded)
        return
    rows = compared(loaded)
    yield from table_text(names, rows)
    if asked.out is not None:
        write_bytes(asked.out, page("Comparison", [*warned(warnings), _html(names, rows)]).encode())
        yield str(asked.out)


def _load(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileError(f"there is no folder {folder}")
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        return report | json.loads((folder / "values.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        raise FileError(f"{folder} holds no report of `sfumato evaluate` that can be read") from None


def unlike(loaded: list[dict[str, Any]], names: list[str]) -> Iterator[str]:
    """What keeps reports from being comparable: another reference, crop, resize or network; and what else may be why they differ."""
    first = loaded[0]["figures"][0]["source"] if loaded[0]["figures"] else {}
    for other, name in zip(loaded[1:], names[1:], strict=True):
        source = other["figures"][0]["source"] if other["figures"] else {}
        apart = [k for k in ("reference", "crop") if source.get(k) != first.get(k)]
        looked = [next((f["source"] for f in r["figures"] if f["source"].get("features")), {}) for r in (loaded[0], other)]
        apart += [k for k in ("resize", "features") if looked[0].get(k) != looked[1].get(k)]
        if apart:
            yield f"warning: {name} differs from {names[0]} in {', '.join(apart)}: such figures do not compare"
        made = [(_samples(loaded[0]), _samples(other), k) for k in ("count", "steps", "guidance")]
        if asked := [f"{k} ({b.get(k)}, not {a.get(k)})" for a, b, k in made if a.get(k) != b.get(k)]:
            yield f"warning: the samples of {name} were made otherwise than those of {names[0]}: {', '.join(asked)}"


def _samples(report: dict[str, Any]) -> dict[str, Any]:
    """What the last figure that is of samples says of them."""
    return next((f["source"]["samples"] for f in reversed(report["figures"]) if not f["group"].startswith("pairwise")), {})


def spread_lines(loaded: list[dict[str, Any]]) -> Iterator[str]:
    """Each figure's mean over reports, its standard deviation, and its range."""
    from sfumato.metrics.stability import spreads

    units = {f"{f['group']}/{f['name']}": f["unit"] for f in loaded[0]["figures"]}
    found = spreads([{f"{f['group']}/{f['name']}": f["value"] for f in r["figures"]} for r in loaded])
    width = max((len(k) for k in found), default=0)
    for name, s in found.items():
        between = f"{shown(s['min'])} to {shown(s['max'])}, {len(loaded)} reports"
        yield f"{name:{width}}  {shown(s['mean'], units[name])}  +- {shown(s['std'])}  ({between})"


def compared(loaded: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a figure of the first report: values, and verdicts on the others; p values are adjusted for their number (Holm)."""
    from sfumato.metrics.intervals import holm, paired_test

    rows: list[dict[str, Any]] = []
    for f in loaded[0]["figures"]:
        key = (f["group"], f["name"])
        same = [next((g for g in r["figures"] if (g["group"], g["name"]) == key), None) for r in loaded]
        row = {"group": f["group"], "name": f["name"], "unit": f["unit"], "better": f["better"], "values": [g and g["value"] for g in same]}
        rows.append(row | {"tests": [_test(loaded[0], r, "/".join(key), f, g, paired_test) for r, g in zip(loaded[1:], same[1:], strict=True)]})
    tests = [t for row in rows for t in row["tests"] if t and "p" in t]
    for t, p in zip(tests, holm([t["p"] for t in tests]), strict=True):
        t["p"], t["real"] = p, p < 0.05
    return rows


def _test(first: dict[str, Any], other: dict[str, Any], key: str, f: dict[str, Any], g: dict[str, Any] | None, paired: Any) -> dict[str, Any] | None:
    """The verdict on one figure: a paired test where both have a value of the same pictures, else whether their intervals lie apart.

    None is given where the figures are not of the same reference, seen the same way, or where another number of samples alone would move them.
    """
    if g is None or f["value"] is None or g["value"] is None:
        return None
    one, two = f["source"], g["source"]
    if unequal := [k for k in ("reference", "crop", "resize", "features") if one.get(k) != two.get(k)]:
        return {"difference": g["value"] - f["value"], "real": None, "how": f"another {unequal[0]}"}
    if f["of_count"] and one["samples"].get("count") != two["samples"].get("count"):
        return {"difference": g["value"] - f["value"], "real": None, "how": "another number of samples"}
    if key.startswith("pairwise") and first["ids"] != other["ids"]:
        return {"difference": g["value"] - f["value"], "real": None, "how": "other pairs"}
    a, b = first["values"].get(key), other["values"].get(key)
    if a and b and len(a) == len(b) and _same_pictures(first, other, key):
        return paired(np.array(b), np.array(a)) | {"how": "paired"}
    if f["interval"] and g["interval"]:
        apart = f["interval"][1] < g["interval"][0] or g["interval"][1] < f["interval"][0]
        return {"difference": g["value"] - f["value"], "real": apart, "how": "intervals"}
    return {"difference": g["value"] - f["value"], "real": None, "how": "no interval"}


def _same_pictures(first: dict[str, Any], other: dict[str, Any], key: str) -> bool:
    """Whether the i-th value of both is of the same thing: the same pair, which was looked at before, or the same request."""
    if key.startswith("pairwise"):
        return True
    sources = [next(f["source"] for f in r["figures"] if f"{f['group']}/{f['name']}" == key) for r in (first, other)]
    asked = all("model" in s["samples"] for s in sources) and sources[0]["seed"] == sources[1]["seed"]
    return asked and not key.endswith(("recall", "coverage"))  # whose rows are reference pictures, which share the samples: they vary together


def verdict(test: dict[str, Any] | None, better: int) -> str:
    """In words."""
    if test is None:
        return "-"
    if test["real"] is None:
        return f"not said: {test['how']}"
    if not test["real"]:
        return "no real difference"
    word = "differs" if not better else "better" if test["difference"] * better > 0 else "worse"
    return f"{word} (p {test['p']:.2g})" if "p" in test else f"{word} ({test['how']} apart)"


def table_text(names: list[str], rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "; ".join(f"{chr(65 + i)} = {n}" for i, n in enumerate(names))
    width = max((len(r["name"]) for r in rows), default=0)
    group = None
    for r in rows:
        if r["group"] != group:
            group = r["group"]
            yield f"[{group}]"
        cells = [shown(v, r["unit"]) for v in r["values"]]
        said = [f"{c}: {verdict(t, r['better'])}" for c, t in zip(cells[1:], r["tests"], strict=True)]
        yield f"  {r['name']:{width}}  {cells[0]}  |  " + "  |  ".join(said)


def warned(warnings: list[str]) -> list[str]:
    """As paragraphs of a page."""
    return [f'<p class="remark">{html.escape(w)}</p>' for w in warnings]


def _html(names: list[str], rows: list[dict[str, Any]]) -> str:
    head = "<tr><th>figure</th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"
    body = []
    for r in rows:
        cells = [shown(v, r["unit"]) for v in plain(r["values"])]
        said = ["", *(verdict(t, r["better"]) for t in r["tests"])]
        cell = "".join(f'<td class="n">{html.escape(c)}<br><small>{html.escape(s)}</small></td>' for c, s in zip(cells, said, strict=True))
        body.append(f"<tr><td>{html.escape(r['group'])}: {html.escape(r['name'])}</td>{cell}</tr>")
    return f"<table>{head}{''.join(body)}</table>"
