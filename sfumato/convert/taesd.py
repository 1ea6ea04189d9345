"""Tiny autoencoders (TAESD) from the files of their author, two of plain numbered layers, and from folders of diffusers (AutoencoderTiny)."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from sfumato.codecs.tiny import TinyAutoencoder, TinyConfig
from sfumato.convert.checkpoint import read_tensors
from sfumato.convert.diffusers import filled, read_json, tensors_of
from sfumato.core.checkpoint import FileError

FOLDER = "AutoencoderTiny"
BLOCK = re.compile(r"(\d+)\.conv\.0\.weight")


def read_tiny(path: Path, tensors: dict[str, Tensor]) -> TinyAutoencoder | None:
    """The codec of a file whose `tensors` are known; its author's decoder with the encoder that lies beside it. None where they are of another kind.

    Raises FileError.
    """
    parts = parts_of(tensors)
    if not parts:
        return None
    other = "decoder" if "encoder" in parts else "encoder"
    beside = path.with_name(path.name.replace("encoder" if other == "decoder" else "decoder", other))
    if other not in parts and beside != path and beside.is_file():
        parts |= parts_of(read_tensors(beside))
    if "decoder" not in parts:
        raise FileError(f"{path} is the encoder of a tiny autoencoder, and {beside.name} is not beside it: pictures come from that")
    return made_of(parts, path)


def read_tiny_folder(folder: Path) -> TinyAutoencoder | None:
    """The codec of a folder of diffusers, None where that is of another kind. Raises FileError."""
    if read_json(folder / "config.json").get("_class_name") != FOLDER:
        return None
    return made_of(parts_of(tensors_of(folder)), folder)


def parts_of(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"encoder", "decoder": tensors by the numbers of our layers}; empty where they are of another kind. Its author counts the bending of latents as
    the first layer of the decoder, so that his numbers there are one higher.
    """
    if not all(re.match(r"((en|de)coder\.(layers\.)?)?\d+\.", name) for name in tensors) or not any(BLOCK.search(name) for name in tensors):
        return {}
    if any(name.startswith("decoder.") for name in tensors):
        cut = {kind: {k.split(".", 1)[1]: v for k, v in tensors.items() if k.startswith(f"{kind}.")} for kind in ("encoder", "decoder")}
        layers = all(k.startswith("layers.") for k in cut["decoder"])
        found = {kind: {k.removeprefix("layers."): v for k, v in part.items()} for kind, part in cut.items() if part}
        return found if layers else found | {"decoder": _lower(found["decoder"])}
    return {"encoder": tensors} if "0.weight" in tensors else {"decoder": _lower(tensors)}


def _lower(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{int(k.split('.')[0]) - 1}.{k.split('.', 1)[1]}": v for k, v in tensors.items()}


def made_of(parts: dict[str, dict[str, Tensor]], source: Path) -> TinyAutoencoder:
    """Raises FileError where they do not make one."""
    own = parts["decoder"]
    last = max((int(k.split(".")[0]) for k in own), default=0)
    try:
        first, picture = own["0.weight"].shape, own[f"{last}.weight"].shape
        config = TinyConfig(
            image_channels=picture[0], latent_channels=first[1], width=first[0], blocks=tuple(reversed(runs(own))), encodes="encoder" in parts,
        )  # fmt: skip
    except (KeyError, IndexError, ValueError) as e:
        raise FileError(f"{source} is no tiny autoencoder that is known ({type(e).__name__}: {e})") from None
    return filled(TinyAutoencoder, config, {f"{kind}.{k}": v.float() for kind, part in parts.items() for k, v in part.items()}, source)


def runs(tensors: dict[str, Tensor]) -> list[int]:
    """How many blocks follow each other, from the first layer on."""
    at = sorted({int(m[1]) for k in tensors if (m := BLOCK.match(k))})
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(at)) if b != a + 1]
    return [b - a for a, b in pairwise([0, *ends, len(at)])]
