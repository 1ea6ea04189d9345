"""Evaluating models and folders: figures say where they come from, reports can be compared, nothing is lost by a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sfumato.apps.cli import main
from sfumato.core.checkpoint import checkpoints
from sfumato.core.report import Figure, plain, shown
from sfumato.metrics.features import RESIZES, feature_net, look, resized
from sfumato.pipelines import evaluate as subject
from sfumato.pipelines.evaluate import Evaluation, Options, looked_at, picture_set

NEEDED = ("reference", "samples", "crop", "seed", "version", "command")


@pytest.fixture
def blurred(own_folder: Path, tmp_path: Path) -> Path:
    """The same forty pictures, a little out of focus, under the same names."""
    out = tmp_path / "blurred"
    for path in own_folder.rglob("*.png"):
        target = out / path.relative_to(own_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).filter(ImageFilter.GaussianBlur(1)).save(target)
    return out


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def evaluated(folder: Path, reference: Path, out: Path, metrics: str = "pairwise,distribution") -> None:
    main(["evaluate", str(folder), "--reference", str(reference), "--out", str(out), "--size", "32", "--metrics", metrics])


def value(report: dict, name: str) -> float:
    return next(f["value"] for f in report["figures"] if f["name"] == name)


def test_a_folder_of_samples(own_folder: Path, blurred: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", str(blurred), "--reference", str(own_folder), "--out", str(tmp_path / "a"), "--size", "32"])
    assert capsys.readouterr().out.strip().endswith("index.html")
    report = report_of(tmp_path / "a")
    for f in report["figures"]:
        assert set(NEEDED) <= set(f["source"]), f["name"]
        assert f["source"]["reference"]["count"] == 40
        assert len(f["source"]["reference"]["sha256"]) == 64
        assert f["n"] >= 1
    groups = {f["group"].split(" ")[0] for f in report["figures"]}
    assert groups == {"pairwise", "distribution", "diversity", "memorisation", "stability", "text"}
    assert 0.5 <= value(report, "label like that of the nearest reference picture") <= 1, "sub-folders are labels"
    assert value(report, "psnr") < 40
    page = (tmp_path / "a" / "index.html").read_text()
    assert "http" not in page.replace("http-equiv", ""), "it must be readable without a network"
    assert page.count("data:image/png;base64") == len(list((tmp_path / "a").glob("*.png"))) > 4
    with pytest.raises(SystemExit):
        main(["evaluate", str(blurred), "--reference", str(own_folder), "--out", str(tmp_path / "a")])
    assert "holds a report already: use --force" in capsys.readouterr().err


def test_the_same_folder_is_ideal(own_folder: Path, tmp_path: Path) -> None:
    main(["evaluate", str(own_folder), "--reference", str(own_folder), "--out", str(tmp_path / "a"), "--size", "32"])
    report = report_of(tmp_path / "a")
    ideal = {"mse": 0, "psnr": 100, "ssim": 1, "precision": 1, "recall": 1, "coverage": 1, "modes: difference of shares": 0, "copies": 1}
    for name, wanted in ideal.items():
        assert value(report, name) == pytest.approx(wanted, abs=1e-6), name
    assert value(report, "Frechet distance (EfficientNet-Lite0)") == pytest.approx(0, abs=1e-4)


def test_a_model(smoke: Path, own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(checkpoints(smoke / "diffusion", "model")[-1])
    argv = ["evaluate", model, "--reference", "emoji", "--count", "24", "--steps", "2", "--repeats", "2", "--out", str(tmp_path / "a")]
    main([*argv, "--keep", str(tmp_path / "kept")])
    report = report_of(tmp_path / "a")
    groups = {f["group"].split(" ")[0] for f in report["figures"]}
    assert groups == {"pairwise", "distribution", "diversity", "memorisation", "stability", "text", "cost"}
    assert len(list((tmp_path / "kept").glob("*.png"))) == 24
    assert value(report, "parameters: denoiser") > 1000
    assert any("few for a Frechet distance" in f["note"] for f in report["figures"])
    spreads = [f["name"] for f in report["figures"] if "spread over" in f["name"]]
    assert {s.rpartition(" ")[2] for s in spreads} == {"seed", "steps", "guidance", "words"}
    again = tmp_path / "b"
    main([*argv[:-1], str(again), "--metrics", "distribution, memorisation"])
    assert {f["group"] for f in report_of(again)["figures"]} == {"distribution", "memorisation"}
    for f in report_of(again)["figures"]:
        same = next(g for g in report["figures"] if g["name"] == f["name"])
        assert f["value"] == pytest.approx(same["value"], rel=1e-5), "the same command must give the same figures"
        assert f["source"]["samples"]["sha256"] == same["source"]["samples"]["sha256"]
    capsys.readouterr()


def test_compare_says_which_differences_are_real(own_folder: Path, blurred: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(blurred, twice)
    worse = tmp_path / "worse"
    for path in blurred.rglob("*.png"):
        (worse / path.relative_to(blurred)).parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).filter(ImageFilter.GaussianBlur(3)).save(worse / path.relative_to(blurred))
    evaluated(blurred, own_folder, tmp_path / "a")
    for name, folder in (("b", twice), ("c", worse)):
        evaluated(folder, own_folder, tmp_path / name, "pairwise")
    capsys.readouterr()
    main(["compare", *(str(tmp_path / n) for n in "abc"), "--out", str(tmp_path / "table.html")])
    said = capsys.readouterr().out
    psnr = next(line for line in said.splitlines() if line.strip().startswith("psnr"))
    assert "no real difference" in psnr.split("|")[1]
    assert "worse (p " in psnr.split("|")[2]
    assert "<table>" in (tmp_path / "table.html").read_text()
    main(["evaluate", str(blurred), "--reference", str(blurred), "--out", str(tmp_path / "d"), "--size", "32", "--metrics", "distribution"])
    capsys.readouterr()
    main(["compare", str(tmp_path / "a"), str(tmp_path / "d")])
    assert "differs from" in capsys.readouterr().out.splitlines()[0]


def test_a_stop_keeps_what_was_seen(own_folder: Path) -> None:
    pictures = picture_set(own_folder, 32)
    e = Evaluation(Options(), feature_net(), pictures, list(range(40)))
    usual = subject.Usual.of(torch.rand(4, 3, 32, 32))

    def until_stopped():
        yield from list(pictures.batches(list(range(40))))[:1]
        raise KeyboardInterrupt

    kept = looked_at(e, until_stopped(), 80, usual)
    assert kept.count == 40
    assert e.remarks == ["stopped by hand after 40 of 80 samples: the figures are of these"]


def test_a_stop_before_the_first_sample_keeps_the_pairs(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subject.Looked, "take", stopped)
    pictures = picture_set(own_folder, 32)
    report, _ = subject.evaluate(pictures, "own", pictures, feature_net(), Options())
    assert {f.group.split(" ")[0] for f in report.figures} == {"pairwise"}
    assert report.remarks[0] == "stopped by hand after 0 of 40 samples: the figures are of these"


def test_a_stop_within_a_batch_leaves_whole_batches(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "BATCH", 16)
    calls = []

    def once(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.zeros(len(x))

    monkeypatch.setattr(subject, "blur", once)
    pictures = picture_set(own_folder, 32)
    report, _ = subject.evaluate(pictures, "own", pictures, feature_net(), Options(groups=("distribution", "stability", "memorisation")))
    assert {f.n for f in report.figures if f.group == "stability"} == {16}
    assert "memorisation" in {f.group for f in report.figures}


def test_pictures_that_are_no_numbers_are_counted_and_left_out(own_folder: Path) -> None:
    pictures = picture_set(own_folder, 32)
    broken = next(pictures.batches(list(range(40)))).clone()
    broken[3] = float("nan")
    e = Evaluation(Options(), feature_net(), pictures, list(range(40)))
    kept = looked_at(e, iter([broken]), 40, subject.Usual.of(torch.rand(4, 3, 32, 32)))
    assert kept.rows == [i for i in range(40) if i != 3]
    assert len(torch.cat(kept.features)) == len(torch.cat(kept.small)) == 39
    assert np.concatenate(kept.failed["not_finite"]).nonzero()[0].tolist() == [3]
    assert "1 of 40 samples are not finite" in e.remarks[0]


def test_a_model_that_draws_no_numbers_is_evaluated_all_the_same(smoke: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sfumato.pipelines.load import load

    model = load(checkpoints(smoke / "diffusion", "model")[-1])
    whole = type(model).decode

    def sometimes(self: object, z: torch.Tensor) -> torch.Tensor:
        if (z.mean((1, 2, 3)) > torch.quantile(seen, 0.75)).any():
            raise subject.NotFinite("no number")
        seen_now.append(z)
        return whole(self, z)  # type: ignore[arg-type]

    seen_now: list[torch.Tensor] = []
    reference = picture_set("emoji", model.size, set(model.meta["words"]))
    requests = subject.asked_for(model, reference, list(range(8)), Options(steps=2))
    monkeypatch.setattr(type(model), "decode", lambda self, z: (seen_now.append(z), whole(self, z))[1])
    list(subject.drawn(model, requests))
    seen = torch.cat(seen_now).mean((1, 2, 3))
    monkeypatch.setattr(type(model), "decode", sometimes)
    found = torch.cat(list(subject.drawn(model, requests)))
    assert torch.isnan(found).flatten(1).any(1).sum() == 2


def test_a_picture_that_was_renamed_is_looked_at_anew(own_folder: Path, tmp_path: Path) -> None:
    """Features are kept in the order of names: the same pictures under other names are another set."""
    folder = tmp_path / "renamed"
    shutil.copytree(own_folder, folder)
    net = feature_net()
    before = picture_set(folder, 32)
    kept, _ = subject.features_of(net, before, range(40), "antialias")
    first = next(p for p in sorted(folder.rglob("*.png")))
    first.rename(first.with_name("zzz.png"))
    after = picture_set(folder, 32)
    assert after.digest != before.digest
    now, _ = subject.features_of(net, after, range(40), "antialias")
    torch.testing.assert_close(now, look(net, subject.white(next(after.batches(range(40)))))[0])
    assert not torch.equal(now, kept)


def test_copies_of_pictures_that_the_figures_leave_out_are_found(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "MOST", 10)
    pictures = picture_set(own_folder, 32)
    report, e = subject.evaluate(pictures, "own", pictures, feature_net(), Options(groups=("memorisation",), count=20))
    assert value(report.to_json(), "copies") == 1
    assert [n["reference"] for n in e.nearest] == [pictures.names[i] for i in subject.evenly(40, 20)]


def test_few_samples_lose_only_what_they_are_too_few_for(own_folder: Path) -> None:
    pictures = picture_set(own_folder, 32)
    report, _ = subject.evaluate(pictures, "own", pictures, feature_net(), Options(count=3))
    assert {f.group.split(" ")[0] for f in report.figures} >= {"pairwise", "distribution", "memorisation", "stability"}


def test_another_number_of_samples_is_no_difference(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same pictures, more or fewer of them: what only their number moves is not called better."""
    for name, count in (("a", "40"), ("b", "12")):
        argv = ["evaluate", str(own_folder), "--reference", str(own_folder), "--out", str(tmp_path / name), "--size", "32"]
        main([*argv, "--count", count, "--metrics", "distribution,diversity"])
    capsys.readouterr()
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "t.html")])
    said = capsys.readouterr().out
    assert "the samples of" in said.splitlines()[0]
    assert "count (12, not 40)" in said.splitlines()[0]
    frechet = next(line for line in said.splitlines() if line.strip().startswith("Frechet distance"))
    assert "not said: another number of samples" in frechet
    assert "count (12, not 40)" in (tmp_path / "t.html").read_text()


def test_a_stop_later_keeps_the_figures_that_are_there(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subject, "diversity_figures", stopped)
    pictures = picture_set(own_folder, 32)
    report, _ = subject.evaluate(pictures, "own", pictures, feature_net(), Options())
    assert {f.group.split(" ")[0] for f in report.figures} == {"pairwise", "distribution"}
    assert report.remarks[-1].startswith("stopped by hand")


def test_what_cannot_be_evaluated(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = (
        (["--metrics", "distribtion"], "must be all or among"),
        (["--count", "-1"], "count (=-1)"),
        (["--repeats", "1"], "repeats (=1)"),
        (["--features", "inception"], "pt_inception-2015-12-05"),
        (["--features", "inception", "--features-path", str(next(own_folder.rglob("*.png")))], "is not the original Inception file"),
        (["--size", "-3"], "size"),
    )
    for more, message in cases:
        with pytest.raises(SystemExit) as done:
            main(["evaluate", str(own_folder), "--reference", str(own_folder), "--out", str(tmp_path / "x"), *more])
        assert done.value.code == 2
        err = capsys.readouterr().err
        assert message in err, err
        assert err.strip().count("\n") == 0


# --- features -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", RESIZES)
def test_every_resize_keeps_flat_pictures_flat_and_is_deterministic(how: str) -> None:
    flat = torch.full((1, 3, 50, 70), 0.3)
    torch.testing.assert_close(resized(flat, 32, how), torch.full((1, 3, 32, 32), 0.3))  # type: ignore[arg-type]
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert resized(x, 32, how).shape == (1, 3, 32, 32)  # type: ignore[arg-type]
    assert torch.equal(resized(x, 64, how), x)  # type: ignore[arg-type]


def test_the_legacy_resize_is_tensorflows() -> None:
    """Output i is read at i * scale: by half, every other pixel; the right one averages."""
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) / 8
    torch.testing.assert_close(resized(ramp, 4, "legacy-tf")[0, 0, 0], torch.tensor([0.0, 2, 4, 6]) / 8)
    assert float((resized(ramp, 4, "antialias") - resized(ramp, 4, "legacy-tf")).abs().mean()) > 0.05
    with pytest.raises(ValueError, match=r"resize \(='cubic'\) must be one of"):
        resized(ramp, 4, "cubic")  # type: ignore[arg-type]


def test_features_do_not_depend_on_the_batch() -> None:
    net, x = feature_net(), torch.rand(70, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    together = look(net, x)[0]
    alone = torch.cat([look(net, x[i : i + 1])[0] for i in range(0, 70, 7)])
    assert float((together[::7] - alone).abs().max()) < 1e-5


def test_inceptions_graph_has_the_original_names_and_shapes() -> None:
    from sfumato.nn.inception import InceptionV3

    network = InceptionV3().eval()
    state = network.state_dict()
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Mixed_6b.branch7x7_2.conv.weight"].shape == (128, 128, 1, 7)
    assert state["Mixed_7c.branch3x3dbl_3b.bn.running_var"].shape == (384,)
    assert state["fc.weight"].shape == (1008, 2048)
    assert sum(p.numel() for p in network.parameters()) == 21_785_568 + 1008 * 2049  # the trunk of every Inception v3, and 1008 classes
    with torch.no_grad():
        features, logits = network(torch.zeros(2, 3, 299, 299))
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 1008)


def test_numbers_are_shown_as_they_are_meant() -> None:
    assert shown(None) == "-"
    assert shown(0.00012345) == "0.000123"
    assert shown(12_345_678.0) == "12,345,678"
    assert shown(29.81234, "dB") == "29.81 dB"
    assert plain({"a": float("nan"), "b": [np.float32(1.5)]}) == {"a": None, "b": [1.5]}
    assert Figure("g", "n", 1.0).source == {}


def test_few_pairs_are_said_to_be_few_and_are_not_compared(own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for i, path in enumerate(sorted(own_folder.rglob("*.png"))):
        target = other / path.relative_to(own_folder) if i < 3 else other / f"x{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, folder in (("a", own_folder), ("b", other)):
        evaluated(folder, own_folder, tmp_path / name)
    assert any("pairwise figures are of 3 of 40 samples" in r for r in report_of(tmp_path / "b")["remarks"])
    assert any("100% of the samples are reference pictures themselves" in r for r in report_of(tmp_path / "b")["remarks"])
    capsys.readouterr()
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "not said: other pairs" in capsys.readouterr().out
