"""taming-transformers and diffusers VQGANs: the same numbers as the code they were written by, back again bit for bit, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import GumbelQuantize, VectorQuantizer2
from torch import Tensor, nn

from sfumato.apps.cli import main
from sfumato.codecs.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.codecs.bottlenecks.vq import VQConfig
from sfumato.codecs.resnets import ResnetConfig
from sfumato.convert.checkpoint import read_tensors
from sfumato.convert.taming import from_pack, read_model, read_vqgan, to_pack, to_taming, write_vqgan
from sfumato.core.checkpoint import FileError
from sfumato.core.seams import Cond
from sfumato.pipelines.codec import load_codec
from sfumato.priors.gpt import cached, sample_gpt

F16 = {"ch": 32, "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": [4], "resolution": 64, "z_channels": 32}
F8 = {"ch": 32, "ch_mult": (1, 2, 2, 4), "num_res_blocks": 1, "attn_resolutions": [8, 16], "resolution": 64, "z_channels": 16}


class EMAQuantizer(VectorQuantizer2):
    """The published package lacks its later EMA quantizer: the same lookup, with that one's three tensors."""

    def __init__(self, size: int, channels: int) -> None:
        super().__init__(size, channels, beta=0.25)
        self.embedding.cluster_size = nn.Parameter(torch.rand(size), requires_grad=False)
        self.embedding.embed_avg = nn.Parameter(torch.randn(size, channels), requires_grad=False)


class Reference(nn.Module):
    """The first stage as taming-transformers puts it together, without Lightning."""

    def __init__(self, dd: dict, size: int, channels: int, quantizer: str = "vq") -> None:
        super().__init__()
        torch.manual_seed(0)
        dd = {**dd, "in_channels": 3, "out_ch": 3, "dropout": 0.0, "double_z": False}
        self.encoder, self.decoder = Encoder(**dd), Decoder(**dd)
        z = dd["z_channels"]
        match quantizer:
            case "vq":
                self.quantize = VectorQuantizer2(size, channels, beta=0.25)
            case "ema":
                self.quantize = EMAQuantizer(size, channels)
            case "gumbel":
                self.quantize = GumbelQuantize(z, channels, n_embed=size, kl_weight=1e-8, temp_init=1.0)
        self.quant_conv = nn.Conv2d(z, z if quantizer == "gumbel" else channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, z, 1)
        for p in self.parameters():  # so that no part can be left out unseen
            nn.init.normal_(p, 0.02, 0.15 if p.ndim > 1 else 0.3)
        self.eval()

    @torch.no_grad()
    def indices(self, x: Tensor) -> Tensor:
        z = self.quant_conv(self.encoder(x))
        if isinstance(self.quantize, GumbelQuantize):
            return self.quantize.proj(z).argmax(1).flatten()
        return self.quantize(z)[2][2].flatten()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    @property
    def table(self) -> Tensor:
        return (self.quantize.embed if isinstance(self.quantize, GumbelQuantize) else self.quantize.embedding).weight


class Callback:
    """As Lightning's checkpoints hold them."""

    def __init__(self) -> None:
        self.best = torch.tensor(0.5)


@pytest.mark.parametrize(("dd", "size", "channels", "kind"), [(F16, 1024, 32, "vq"), (F8, 512, 4, "vq"), (F8, 64, 8, "ema"), (F8, 64, 8, "gumbel")])
def test_taming_checkpoints_decode_and_encode_as_the_reference_does(dd: dict, size: int, channels: int, kind: str, tmp_path: Path) -> None:
    reference = Reference(dd, size, channels, kind)
    state = dict(reference.state_dict())
    state["loss.discriminator.main.0.weight"] = torch.ones(3)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {Callback: Callback()}, "hyper_parameters": OrderedDict(a=1)}, path)
    codec = read_vqgan(path)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        indices = codec.encode(x).indices
        assert indices is not None
        assert torch.equal(indices.flatten(), reference.indices(x))
        assert len(indices.unique()) > 3, "one code alone proves nothing"
        z = reference.table[indices[..., 0]].movedim(-1, 1)
        theirs = reference.decode(z)
        assert float(theirs.std()) > 1e-3
        torch.testing.assert_close(codec.decode_indices(indices), theirs, rtol=0, atol=1e-5)
    back = to_taming(codec)
    original = dict(reference.state_dict())
    assert back.keys() == original.keys()
    assert all(torch.equal(back[k], original[k]) for k in back)
    write_vqgan(codec, tmp_path / "again.ckpt")
    again = torch.load(tmp_path / "again.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(again[k], original[k]) for k in original)
    packed = from_pack(*to_pack(codec))
    assert torch.equal(packed.decode_indices(indices), codec.decode_indices(indices))


def test_the_yaml_says_what_shapes_do_not(tmp_path: Path) -> None:
    torch.save({"state_dict": Reference(F8, 64, 8).state_dict()}, tmp_path / "last.ckpt")
    plain = read_vqgan(tmp_path / "last.ckpt").config
    assert plain.convnet.resolution == 256
    (tmp_path / "run-project.yaml").write_text(
        "model:\n  target: taming.models.vqgan.VQModel\n  params:\n    beta: 0.5\n    ddconfig: {resolution: 64, dropout: 0.1}\n"
    )
    told = read_vqgan(tmp_path / "last.ckpt").config
    assert (told.convnet.resolution, told.convnet.dropout, told.convnet.attention) == (64, 0.1, (16, 8))
    assert told.bottleneck.commitment == 0.5
    assert told.bottleneck.legacy_beta
    (tmp_path / "run-project.yaml").write_text("not: a config")
    with pytest.raises(FileError, match="is no config of a VQGAN"):
        read_vqgan(tmp_path / "last.ckpt")


def test_a_vqmodel_of_diffusers_and_back(tmp_path: Path) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    theirs = VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64), layers_per_block=2, latent_channels=8, num_vq_embeddings=48, vq_embed_dim=4, sample_size=32, scaling_factor=0.3,
    ).eval()  # fmt: skip
    for p in theirs.parameters():
        nn.init.normal_(p, 0.02, 0.15 if p.ndim > 1 else 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    codec = read_vqgan(tmp_path / "theirs")
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = theirs.encode(x).latents
        _, _, (_, _, index) = theirs.quantize(latents)
        indices = codec.encode(x).indices
        assert indices is not None
        assert torch.equal(indices.flatten(), index.flatten())
        torch.testing.assert_close(codec.decode_indices(indices), theirs.decode(latents).sample, rtol=0, atol=1e-5)
    write_vqgan(codec, tmp_path / "ours")
    assert codec.latent_std.tolist() == pytest.approx([1 / 0.3] * 4), "what a generator sees has been scaled by it"
    again = VQModel.from_pretrained(tmp_path / "ours")
    assert again.config.scaling_factor == 0.3
    state = theirs.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_networks_that_the_layout_cannot_hold_are_refused(tmp_path: Path) -> None:
    net = ResnetConfig(width=32, multipliers=(1, 1), attention=(), resolution=16, z_channels=4)
    for change in ({"norm": "batch"}, {"activation": "gelu"}):
        codec = Autoencoder(AutoencoderConfig(convnet=replace(net, **change), bottleneck=VQConfig(size=8, channels=4, cosine=False)))
        with pytest.raises(ValueError, match="must be group and silu"):
            write_vqgan(codec, tmp_path / "x.ckpt")


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    state = dict(Reference(F8, 64, 8).state_dict())
    cases = {
        "lacks 1 tensors": {k: v for k, v in state.items() if k != "decoder.norm_out.bias"},
        "belong nowhere": state | {"encoder.more.weight": torch.ones(2)},
        "no codebook": {k: v for k, v in state.items() if not k.startswith("quantize")},
        "no tensor encoder.conv_in.weight": {"model.weight": torch.ones(2)},
    }
    for message, tensors in cases.items():
        torch.save({"state_dict": tensors}, tmp_path / "x.ckpt")
        with pytest.raises(FileError, match=message):
            read_vqgan(tmp_path / "x.ckpt")
    (tmp_path / "x.ckpt").write_bytes(b"no zip")
    with pytest.raises(FileError, match="cannot be read as a checkpoint"):
        read_vqgan(tmp_path / "x.ckpt")
    with pytest.raises(FileError, match="there is no file"):
        read_tensors(tmp_path / "nothing.ckpt")


# --- malice -----------------------------------------------------------------------------------------------------------------------------------------


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: object, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple:
        return self.function, self.args  # type: ignore[return-value]


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _programs(canary: Path) -> list[bytes]:
    """Twenty pickles that would write a file."""
    command, code = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    text = lambda s: b"X" + len(s).to_bytes(4, "little") + s.encode()  # noqa: E731
    called = [
        ("os", "system", command), ("posix", "system", command), ("subprocess", "getoutput", command), ("subprocess", "check_output", command),
        ("builtins", "eval", code), ("builtins", "exec", code), ("__builtin__", "eval", code), ("os", "popen", command), ("timeit", "timeit", code),
        ("runpy", "run_path", str(canary)), ("pty", "spawn", command), ("code", "interact", code), ("torch.hub", "load", command),
        ("numpy.testing._private.utils", "runstring", code), ("builtins", "open", str(canary)),
    ]  # fmt: skip
    found = [b"\x80\x02" + _global(m, n) + text(a) + b"\x85R." for m, n, a in called]
    eval_of = _global("builtins", "eval")
    found.append(b"\x80\x02(" + text(code) + b"ibuiltins\neval\n.")  # INST
    found.append(b"\x80\x02(" + eval_of + text(code) + b"o.")  # OBJ
    found.append(b"\x80\x04" + text("builtins") + text("eval") + b"\x93" + text(code) + b"\x85R.")  # STACK_GLOBAL
    found.append(b"\x80\x02" + eval_of + text(code) + b"\x85\x81.")  # NEWOBJ
    setstate = _global("collections", "OrderedDict") + b")R}" + text("__setstate__") + eval_of + b"sb" + text(code) + b"b."
    found.append(b"\x80\x02" + setstate)  # BUILD with a state that is a call
    return found


def test_twenty_malicious_files_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    programs = _programs(canary)
    assert len(programs) == 20
    for i, program in enumerate(programs):
        path = tmp_path / f"{i}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/version", "3\n")
        with pytest.raises(FileError):
            read_vqgan(path)
        assert not canary.exists(), f"program {i} ran"
        (tmp_path / f"{i}.pt").write_bytes(program)
        with pytest.raises(FileError):
            read_vqgan(tmp_path / f"{i}.pt")
        assert not canary.exists(), f"program {i} ran without a zip"
    ran = 0
    for program in programs[:7]:  # the programs are real: Python's own reader runs them
        try:
            pickle.loads(program)
        except Exception:
            continue
        ran += canary.exists()
        canary.unlink(missing_ok=True)
    assert ran >= 5


def test_a_call_beside_good_tensors_is_left_out(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    state = {"a.weight": torch.arange(4.0)}
    torch.save({"state_dict": state, "extra": Call(os.system, f"touch {canary}")}, tmp_path / "x.ckpt")
    found = read_tensors(tmp_path / "x.ckpt")
    assert torch.equal(found["a.weight"], state["a.weight"])
    assert not canary.exists()


def test_a_checkpoint_that_lies_about_itself_is_refused(tmp_path: Path) -> None:
    round_: dict = {"a": torch.ones(2)}
    round_["state_dict"] = round_
    torch.save(round_, tmp_path / "round.ckpt")
    assert set(read_tensors(tmp_path / "round.ckpt")) == {"a"}
    torch.save({"empty": torch.empty(0), "a": torch.ones(2)}, tmp_path / "empty.ckpt")
    assert read_tensors(tmp_path / "empty.ckpt")["empty"].numel() == 0
    torch.save({"giant": torch.ones(1).as_strided((1 << 40,), (0,))}, tmp_path / "giant.ckpt")
    with pytest.raises(FileError, match="more than the file holds"):
        read_tensors(tmp_path / "giant.ckpt")


def test_the_first_stage_of_a_whole_model_is_taken_alone(tmp_path: Path) -> None:
    reference = Reference(F8, 64, 8)
    state = {f"first_stage_model.{k}": v for k, v in reference.state_dict().items()} | {"transformer.tok_emb.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "net2net.ckpt")
    assert read_vqgan(tmp_path / "net2net.ckpt").spec.codebook_size == 64


# --- the second stage -------------------------------------------------------------------------------------------------------------------------------


def reference_gpt(**more: int) -> nn.Module:
    import transformers

    transformers.top_k_top_p_filtering = None  # which newer versions have not, and the module only imports
    from taming.modules.transformer.mingpt import GPT

    torch.manual_seed(0)
    gpt = GPT(vocab_size=64, block_size=16, n_layer=2, n_head=4, n_embd=32, **more).eval()
    for p in gpt.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    return gpt


YAML = """model:
  params:
    sos_token: 5
    transformer_config: {params: {n_head: 4}}
    first_stage_config: {params: {ddconfig: {resolution: 32}}}
    cond_stage_config: %s
"""


def whole(folder: Path, gpt: nn.Module, told: str) -> Path:
    first = {f"first_stage_model.{k}": v for k, v in Reference(F8, 64, 8).state_dict().items()}
    torch.save({"state_dict": first | {f"transformer.{k}": v for k, v in gpt.state_dict().items()}}, folder / "last.ckpt")
    (folder / "x-project.yaml").write_text(YAML % told)
    return folder / "last.ckpt"


@pytest.mark.parametrize("told", ["__is_unconditional__", "{params: {n_classes: 10}}"])
def test_a_transformer_over_codes_is_that_of_the_reference(told: str, tmp_path: Path) -> None:
    gpt = reference_gpt()
    from taming.modules.transformer import mingpt

    _, ours = read_model(whole(tmp_path, gpt, told))
    assert ours is not None
    classes = "n_classes" in told
    cond, first = (Cond(label=torch.tensor([3, 7])), torch.tensor([3, 7])) if classes else (Cond(), torch.tensor([5, 5]))
    tokens = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = gpt(torch.cat([first[:, None], tokens[:, :-1]], 1))[0]
        torch.testing.assert_close(ours(tokens, cond), theirs, rtol=0, atol=1e-5)
    torch.manual_seed(11)
    expected = mingpt.sample(gpt, first[:, None], 16, temperature=0.9, sample=True, top_k=20)[:, 1:]
    g = torch.Generator().manual_seed(11)
    race = lambda _: torch.empty(2, 64).exponential_(generator=g)  # noqa: E731
    drawn = list(sample_gpt(cached(ours, [(cond, 1.0)], 2), 16, race, temperature=0.9, top_k=20))[-1]  # type: ignore[arg-type]
    assert torch.equal(drawn, expected), "the same random numbers give the same codes"


def test_a_whole_model_draws_by_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = whole(tmp_path, reference_gpt(), "{params: {n_classes: 10}}")
    model = tmp_path / "model.safetensors"
    main(["convert", str(source), str(model)])
    assert "with a transformer over its codes, 10 classes" in capsys.readouterr().err
    main(["generate", "--model", str(model), "--label", "3", "--seed", "1", "--guidance", "2", "--out", str(tmp_path / "a.png")])
    assert "guidance has no effect" in capsys.readouterr().err
    assert Image.open(tmp_path / "a.png").size == (32, 32)
    with pytest.raises(SystemExit):
        main(["generate", "--model", str(model), "--seed", "1", "--out", str(tmp_path / "b.png")])
    assert "draws one of 10 classes" in capsys.readouterr().err


def test_what_cannot_be_read_of_a_second_stage_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt = reference_gpt(n_unmasked=4)
    with pytest.raises(FileError, match="whose first tokens see each other"):
        read_model(whole(tmp_path, gpt, "__is_unconditional__"))
    source = whole(tmp_path, reference_gpt(), "__is_unconditional__")
    tensors = torch.load(source, weights_only=True)["state_dict"]
    torch.save({"state_dict": tensors | {"cond_stage_model.encoder.conv_in.weight": torch.ones(2)}}, source)
    with pytest.raises(FileError, match="draws after pictures"):
        read_model(source)
    torch.save({"state_dict": tensors}, source)
    yaml = (tmp_path / "x-project.yaml").read_text()
    (tmp_path / "x-project.yaml").write_text(yaml + "    permuter_config: {target: taming.modules.transformer.permuter.ZCurve}\n")
    with pytest.raises(FileError, match="in another order than row by row"):
        read_model(source)
    (tmp_path / "x-project.yaml").write_text(YAML % "{target: taming.modules.misc.coord.CoordStage, params: {n_embed: 1024}}")
    with pytest.raises(FileError, match="is told neither classes nor nothing"):
        read_model(source)
    (tmp_path / "x-project.yaml").unlink()
    with pytest.raises(FileError, match="whose heads only its YAML tells"):
        read_model(source)
    main(["convert", str(source), str(tmp_path / "codec.safetensors")])
    assert "the codec alone is written" in capsys.readouterr().err
    assert load_codec(tmp_path / "codec.safetensors").codec.spec.codebook_size == 64
