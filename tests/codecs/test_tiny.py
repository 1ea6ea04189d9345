"""Tiny autoencoders beside those of diffusers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from sfumato.codecs.tiny import TinyAutoencoder
from sfumato.convert.about import about
from sfumato.convert.stable import read_codec
from sfumato.core.checkpoint import FileError


@pytest.fixture(scope="module")
def theirs() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


def numbered(theirs: AutoencoderTiny, kind: str) -> dict[str, Tensor]:
    """As the author's files have them: his decoder begins with a layer without numbers."""
    own = {k.removeprefix("layers."): v for k, v in getattr(theirs, kind).state_dict().items()}
    up = kind == "decoder"
    return {f"{int(k.split('.')[0]) + up}.{k.split('.', 1)[1]}": v.clone() for k, v in own.items()}


@pytest.fixture(scope="module", params=["folder", "file of diffusers", "the author's two files", "both in one"])
def ours(request: pytest.FixtureRequest, theirs: AutoencoderTiny, tmp_path_factory: pytest.TempPathFactory) -> TinyAutoencoder:
    at = tmp_path_factory.mktemp("taesd")
    parts = {kind: numbered(theirs, kind) for kind in ("encoder", "decoder")}
    match request.param:
        case "folder":
            theirs.save_pretrained(at)
            found = read_codec(at)
        case "file of diffusers":
            save_file({k: v.clone() for k, v in theirs.state_dict().items()}, at / "tiny.safetensors")
            found = read_codec(at / "tiny.safetensors")
        case "both in one":
            save_file({f"{kind}.{k}": v for kind, part in parts.items() for k, v in part.items()}, at / "tiny.safetensors")
            found = read_codec(at / "tiny.safetensors")
        case _:
            for kind, part in parts.items():
                torch.save(part, at / f"taesd_{kind}.pth")
            found = read_codec(at / "taesd_decoder.pth")
    assert isinstance(found, TinyAutoencoder)
    return found


@torch.no_grad()
def test_both_ways_as_in_diffusers(ours: TinyAutoencoder, theirs: AutoencoderTiny) -> None:
    x, z = torch.rand(2, 3, 64, 48) * 2 - 1, 4 * torch.randn(2, 4, 8, 6)
    mean = ours.encode(x).mean
    assert mean is not None
    assert mean.shape == z.shape
    assert torch.allclose(mean, theirs.encode(x).latents, atol=1e-5)
    assert torch.allclose(ours.decode(z), theirs.decode(z).sample, atol=1e-5)


def test_a_decoder_alone_draws_and_does_not_encode(theirs: AutoencoderTiny, tmp_path: Path) -> None:
    save_file(numbered(theirs, "decoder"), tmp_path / "taesd_decoder.safetensors")
    found = read_codec(tmp_path / "taesd_decoder.safetensors")
    assert found.decode(torch.zeros(1, 4, 2, 2)).shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match="put its taesd_encoder file beside it"):
        found.encode(torch.zeros(1, 3, 16, 16))
    assert about(tmp_path / "taesd_decoder.safetensors")["what"] == "tiny autoencoder (TAESD): decoder"


def test_an_encoder_alone_is_refused(theirs: AutoencoderTiny, tmp_path: Path) -> None:
    save_file(numbered(theirs, "encoder"), tmp_path / "taesd_encoder.safetensors")
    with pytest.raises(FileError, match=r"taesd_decoder\.safetensors is not beside it"):
        read_codec(tmp_path / "taesd_encoder.safetensors")


def test_layers_that_do_not_fit_are_named(theirs: AutoencoderTiny, tmp_path: Path) -> None:
    whole = numbered(theirs, "decoder")
    del whole["8.conv.2.weight"]
    save_file(whole, tmp_path / "taesd_decoder.safetensors")
    with pytest.raises(FileError, match="does not fit: it lacks 1 tensors"):
        read_codec(tmp_path / "taesd_decoder.safetensors")
