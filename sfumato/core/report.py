"""A report of figures: what each is, how sure, of what, and one HTML page that can be read and looked at without a network. No torch."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from sfumato.core.images import png_bytes

FORMAT = 1


@dataclass(frozen=True)
class Figure:
    """One number with what it needs to be believed.

    `better`: 1 where more is better, -1 where less is, 0 where neither; `interval`: 95 %, None where there is none; `of_count` marks what changes
    with the number of samples alone; `source` says what it was made from: reference and samples (path, count, hash), crop, resize, feature network
    and its hash, seed, version, command; `note`: what to beware of.
    """

    group: str
    name: str
    value: float | None
    unit: str = ""
    better: int = 0
    interval: tuple[float, float] | None = None
    how: str = ""
    n: int = 0
    seconds: float = 0.0
    note: str = ""
    of_count: bool = False
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Points to be drawn as a line: (x, y) each."""

    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Shot:
    """A picture of the report with what it shows."""

    title: str
    image: Image.Image
    text: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that was found of one subject."""

    title: str
    figures: list[Figure]
    about: dict[str, Any]
    remarks: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    shots: list[Shot] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Without the pictures; numbers that are not finite become None."""
        return plain(
            {
                "format": FORMAT,
                "title": self.title,
                "about": self.about,
                "remarks": self.remarks,
                "figures": [asdict(f) for f in self.figures],
                "curves": [asdict(c) for c in self.curves],
            }
        )


def plain(value: Any) -> Any:
    """Ready for JSON."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.item() if hasattr(value, "item") else value


def shown(value: float | None, unit: str = "") -> str:
    """A number as a reader wants it: four digits that mean something."""
    if value is None or not math.isfinite(value):
        return "-"
    if abs(value) >= 10_000 and float(value).is_integer():
        text = f"{value:,.0f}"
    elif value and abs(value) < 1e-3:
        text = f"{value:.3g}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".strip()


# --- HTML ---------------------------------------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-weight: 600; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); font-weight: 600; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } small { opacity: .75; }
img { max-width: 100%; image-rendering: auto; background: #fff; border: 1px solid var(--line); } figure { margin: 1rem 0; }
.remark { background: var(--soft); padding: .5rem .8rem; border-left: 3px solid currentColor; margin: .5rem 0; }
details { font-size: 85%; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
svg { max-width: 100%; height: auto; } svg text { fill: currentColor; font: 12px system-ui, sans-serif; }
"""
ARROWS = {1: "&uarr;", -1: "&darr;", 0: ""}
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # Tol's bright scheme, told apart by the colour-blind


def page(title: str, body: Iterable[str]) -> str:
    """One HTML file that needs nothing else."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang='en'><head>{head}</head><body><h1>{html.escape(title)}</h1>\n" + "\n".join(body) + "\n</body></html>\n"


def to_html(report: Report) -> str:
    """The report as a page: remarks, a table for each group, curves, pictures, and what everything was made from."""
    parts = [facts(report.about)]
    parts += [f'<p class="remark">{html.escape(r)}</p>' for r in report.remarks]
    groups = list(dict.fromkeys(f.group for f in report.figures))
    for group in groups:
        parts.append(f"<h2>{html.escape(group)}</h2>")
        parts.append(table([f for f in report.figures if f.group == group]))
    parts += [f"<h2>{html.escape(c.title)}</h2>{svg(c)}" for c in report.curves]
    parts += [f"<h2>{html.escape(s.title)}</h2>{picture(s)}" for s in report.shots]
    sources = json.dumps(plain({f"{f.group}: {f.name}": {"seconds": f.seconds} | f.source for f in report.figures}), indent=1, ensure_ascii=False)
    parts.append(f"<h2>Where every figure comes from</h2><details><summary>all of it, as JSON</summary><pre>{html.escape(sources)}</pre></details>")
    return page(report.title, parts)


def facts(about: dict[str, Any]) -> str:
    """A small table of names and values."""
    rows = (f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_said(v))}</td></tr>" for k, v in about.items() if v not in (None, "", {}, []))
    return f"<table>{''.join(rows)}</table>"


def _said(value: Any) -> str:
    return ", ".join(f"{k} {_said(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def table(figures: Sequence[Figure]) -> str:
    """Name, value, interval, n and what to beware of; an arrow says which way is better."""
    rows = []
    for f in figures:
        name = f"{html.escape(f.name)} {ARROWS[f.better]}" + (f"<br><small>{html.escape(f.how)}</small>" if f.how else "")
        between = f"[{shown(f.interval[0])}, {shown(f.interval[1])}]" if f.interval else ""
        cells = f'<td>{name}</td><td class="n">{shown(f.value, f.unit)}</td><td class="n">{between}</td><td class="n">{f.n:,}</td>'
        rows.append(f"<tr>{cells}<td>{html.escape(f.note)}</td></tr>")
    head = "<tr><th>figure</th><th>value</th><th>95 % interval</th><th>n</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def picture(shot: Shot) -> str:
    """A picture inside the page."""
    data = base64.b64encode(png_bytes(shot.image)).decode()
    text = f"<figcaption><small>{html.escape(shot.text)}</small></figcaption>" if shot.text else ""
    return f'<figure><img alt="{html.escape(shot.title)}" src="data:image/png;base64,{data}">{text}</figure>'


def svg(curve: Curve, width: int = 640, height: int = 320, *, alone: bool = False) -> str:
    """Lines with axes, drawn by hand so that the page needs no script; `alone`: as a file of its own, on white."""
    points = [p for line in curve.lines.values() for p in line if all(math.isfinite(v) for v in p)]
    if not points:
        return "<p>no points</p>"
    (x0, x1), (y0, y1) = ((min(v), max(v)) for v in zip(*points, strict=True))
    x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0)
    left, bottom, top, right = 70, 46, 14, 14

    def at(x: float, y: float) -> str:
        return f"{left + (x - x0) / (x1 - x0) * (width - left - right):.1f},{height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom):.1f}"

    parts = [
        f'<rect x="{left}" y="{top}" width="{width - left - right}" height="{height - top - bottom}" fill="none" stroke="currentColor" opacity=".3"/>'
    ]
    for i in range(5):
        x, y = x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4
        px, py = (float(v) for v in at(x, y).split(","))
        parts.append(f'<text x="{px:.0f}" y="{height - bottom + 16}" text-anchor="middle">{shown(x)}</text>')
        parts.append(f'<text x="{left - 6}" y="{py + 4:.0f}" text-anchor="end">{shown(y)}</text>')
    for i, (name, line) in enumerate(curve.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        good = [p for p in line if all(math.isfinite(v) for v in p)]
        parts.append(f'<polyline points="{" ".join(at(*p) for p in good)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{at(*p).split(",")[0]}" cy="{at(*p).split(",")[1]}" r="3" fill="{colour}"/>' for p in good]
        parts.append(f'<text x="{left + 10}" y="{top + 18 + 16 * i}" style="fill:{colour}">{html.escape(name)}</text>')
    parts.append(f'<text x="{(width + left) / 2:.0f}" y="{height - 8}" text-anchor="middle">{html.escape(curve.x)}</text>')
    parts.append(f'<text x="14" y="{height / 2:.0f}" transform="rotate(-90 14 {height / 2:.0f})" text-anchor="middle">{html.escape(curve.y)}</text>')
    if alone:
        style = f'xmlns="http://www.w3.org/2000/svg" height="{height}" font-family="sans-serif" font-size="12"'
        parts.insert(0, '<rect width="100%" height="100%" fill="#fff"/>')
    else:
        style = ""
    return f'<svg {style} viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{html.escape(curve.title)}">{"".join(parts)}</svg>'
