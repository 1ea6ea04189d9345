"""Builds sfumato/data/art from the npm packages: one archive of SVG per drawing set, and one table of concepts.

Fetch and unpack the packages first (any npm client: `npm pack NAME@VERSION`, then `tar xzf`), each into a folder of its own
under PACKAGES, named as below; then `python scripts/build_emoji.py PACKAGES`. The result is deterministic.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import sys
import tarfile
import unicodedata
from pathlib import Path

SETS = {  # style: (npm package, version, SPDX licence, attribution, home)
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twemoji, (c) Twitter, Inc and other contributors", "https://github.com/twitter/twemoji"),
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, (c) Google Inc", "https://github.com/googlefonts/noto-emoji"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Fluent Emoji, (c) Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji Flat, (c) Microsoft Corporation", "https://github.com/microsoft/fluentui-emoji"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji, the open-source emoji and icon project", "https://openmoji.org"),
    "emojione": ("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "EmojiOne 2, (c) Ranks.com Inc", "https://github.com/EmojiTwo/emojitwo"),
}  # fmt: skip
NAMES = ("emojibase-data", "17.0.0")
WITHOUT_GROUPS = (2, 9)  # components, flags
ART = Path(__file__).parent.parent / "sfumato" / "data" / "art"


def folder_of(packages: Path, package: str, version: str) -> Path:
    return packages / f"{package.lstrip('@').replace('/', '-')}-{version}"


def slug(label: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_only.replace("&", " and ").replace("'", "")).strip("-")


def code_of(hexcode: str) -> str:
    return hexcode.lower().replace("-fe0f", "")


def read_sets(packages: Path) -> dict[str, dict]:
    sets = {}
    for style, (package, version, *_) in SETS.items():
        folder = folder_of(packages, package, version)
        icons = json.loads((folder / "icons.json").read_text())
        chars = json.loads((folder / "chars.json").read_text())
        aliases = {name: a["parent"] for name, a in icons.get("aliases", {}).items() if set(a) == {"parent"}}
        sets[style] = {
            "icons": icons["icons"],
            "aliases": aliases,
            "chars": {code_of(c): n for c, n in chars.items()},
            "size": (icons.get("width", 16), icons.get("height", 16)),
        }
    return sets


def names_by_code(sets: dict[str, dict]) -> dict[str, list[str]]:
    """Every name, older ones too, that some set gives a code point: sets without a code table are matched through these."""
    names: dict[str, list[str]] = {}
    for s in sets.values():
        older: dict[str, list[str]] = {}
        for alias, parent in s["aliases"].items():
            older.setdefault(parent, []).append(alias)
        for code, name in s["chars"].items():
            names.setdefault(code, []).extend([name, *older.get(name, ())])
    return names


def svg_of(s: dict, name: str) -> str | None:
    name = s["aliases"].get(name, name)
    icon = s["icons"].get(name)
    if icon is None:
        return None
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = icon.get("width", s["size"][0]), icon.get("height", s["size"][1])
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'


def read_concepts(packages: Path) -> list[dict]:
    folder = folder_of(packages, *NAMES)
    data = {tongue: {e["hexcode"]: e for e in json.loads((folder / tongue / "data.json").read_text())} for tongue in ("en", "zh", "zh-hant")}
    messages = json.loads((folder / "en" / "messages.json").read_text())
    groups = {g["order"]: g["key"] for g in messages["groups"]}
    subgroups = {g["order"]: g["key"] for g in messages["subgroups"]}
    concepts = []
    for hexcode, en in data["en"].items():
        if en.get("group") is None or en["group"] in WITHOUT_GROUPS:
            continue
        entry = {"hexcode": hexcode, "emoji": en["emoji"], "group": groups[en["group"]], "subgroup": subgroups[en["subgroup"]], "order": en["order"]}
        for tongue in data:
            here = data[tongue].get(hexcode, {})
            entry[tongue] = {"name": here.get("label", ""), "keywords": here.get("tags", [])}
        concepts.append(entry)
    return sorted(concepts, key=lambda c: c["order"])


def write_archive(style: str, drawings: dict[str, str]) -> None:
    package, version, licence, attribution, home = SETS[style]
    left_out = "unchanged drawings, without flags, components and skin tones"
    notice = f"{attribution}\n{home}\nLicence: {licence}\nSource: npm package {package} {version}; {left_out}.\n"
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, text in [("LICENCE.txt", notice), *((f"{h}.svg", svg) for h, svg in sorted(drawings.items()))]:
            body = text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    (ART / f"{style}.tar.xz").write_bytes(lzma.compress(raw.getvalue(), preset=9 | lzma.PRESET_EXTREME))


def main(packages: Path) -> None:
    ART.mkdir(parents=True, exist_ok=True)
    sets = read_sets(packages)
    names = names_by_code(sets)
    concepts = read_concepts(packages)
    drawings: dict[str, dict[str, str]] = {style: {} for style in SETS}
    for concept in concepts:
        code = code_of(concept["hexcode"])
        for style, s in sets.items():
            own = s["chars"].get(code)
            for name in [own] if own else [slug(concept["en"]["name"]), *names.get(code, ())]:
                svg = svg_of(s, name)
                if svg is not None:
                    drawings[style][concept["hexcode"]] = svg
                    break
    for style, found in drawings.items():
        write_archive(style, found)
    table = {
        "sources": {s: dict(zip(("package", "version", "licence", "attribution", "home"), v, strict=True)) for s, v in SETS.items()},
        "concepts": concepts,
    }
    (ART / "concepts.json.xz").write_bytes(lzma.compress(json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode(), preset=9))
    print(f"{len(concepts)} concepts, {sum(map(len, drawings.values()))} drawings,", {s: len(d) for s, d in drawings.items()})
    print(sum(all(c["hexcode"] in d for d in drawings.values()) for c in concepts), "concepts in every set")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
