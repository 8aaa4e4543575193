"""evaluate_quantitative_metrics.py: its comparisons, its refusals, and the expected ranking by its metrics."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from localctl.cli import evaluate_fid
from localctl.cli import evaluate_metrics as evaluate_quantitative_metrics
from localctl.evaluation import compare as compare_module
from localctl.evaluation import measuring
from localctl.evaluation.compare import CEILING, Comparison, compare, verdict
from localctl.evaluation.measuring import Target, measure
from localctl.evaluation.provenance import REQUIRED, check_provenance
from localctl.evaluation.sheets import ranked
from localctl.evaluation.tables import _escaped, as_json, latex, line, markdown
from localctl.evaluation.workers import spread
from localctl.metrics.bootstrap import Interval
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.micro.detect import truth_of
from localctl.micro.scenes import scene
from research.cache import TableCache
from research.micro_base.clip import new_clip, new_tokenizer
from research.micro_base.export import export
from research.micro_base.unet import new_unet
from research.micro_base.vae import new_vae

pytest_plugins = ["evaluation_fixtures"]

COUNT = 6


@pytest.fixture(scope="module")
def base_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate images with an untrained base of micro's architecture, without an adapter."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("compare")
    tokenizer = new_tokenizer()
    export(folder / "base", new_vae(), new_clip(tokenizer), tokenizer, new_unet())
    arguments = [f"base={folder / 'base'}", f"num_images={COUNT}", "num_inference_steps=1", "device=cpu"]
    assert evaluate_fid.main(["gen", *arguments, f"output_dir={folder / 'set'}"]) == 0
    return folder / "set" / "with_prompts"


@pytest.fixture
def sets(base_set: Path, tmp_path: Path) -> dict[str, Path]:
    """Return the base's set, and sets with the true scenes and noisy copies of them instead of an adapter's images."""
    folders = {name: tmp_path / name for name in ("base", "truth", "noisy")}
    shutil.copytree(base_set, folders["base"])
    for name in ("truth", "noisy"):
        shutil.copytree(base_set, folders[name])
        settings = json.loads((folders[name] / "settings.json").read_text())
        kind = {"truth": "adapter", "noisy": "controlnet"}[name]
        (folders[name] / "settings.json").write_text(json.dumps(settings | {kind: name}))
        for i in range(COUNT):
            image = scene(i, "basic", "test").image
            noise = np.random.default_rng(i).normal(0, 10, image.shape) if name == "noisy" else 0
            Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(folders[name] / f"images/{i:06d}.png")
    return folders


def run(sets: dict[str, Path], tmp_path: Path, *flags: str) -> int:
    arguments = [f"{name}={folder}" for name, folder in sets.items()]
    return evaluate_quantitative_metrics.main([*arguments, "--output_dir", str(tmp_path / "out"), *flags])


def test_the_truth_is_perfect_and_the_noisy_copy_in_between(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(sets, tmp_path, "--against", "noisy") == 0
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    rows = {name: row["figures"] for name, row in content["rows"].items()}
    assert set(rows) == {"base", "noisy", "truth", CEILING}
    truth = {name: figure["mean"] and figure["mean"]["value"] for name, figure in rows["truth"].items()}
    assert truth["f1"] == truth["ssim"] == pytest.approx(1) and truth["lfmse_in"] == 0
    assert truth["region_accuracy"] in (1, None)
    for name in ("f1", "ssim"):
        noisy, base = (rows[row][name]["mean"]["value"] for row in ("noisy", "base"))
        assert base < noisy < 1
    better = rows["truth"]["f1"]["difference"]
    assert better["low"] > 0 and better["verdict"] == "more"
    assert rows["noisy"]["f1"]["difference"]["verdict"] == "no difference"
    with Image.open(tmp_path / "out" / "sheet_truth.png") as sheet:
        assert sheet.width > 3 * 128 and sheet.height > 3 * 128
    with Image.open(tmp_path / "out" / "metrics.png") as bars:
        assert bars.width > 1000 and np.asarray(bars).std() > 10
    assert content["floor"] == "base" and content["provenance"]["sets"]["truth"]["adapter"] == "truth"
    assert content["ids"] == [f"{i:06d}" for i in range(COUNT)]
    check_provenance("metrics", content, REQUIRED)
    assert {"extractor", "weights_sha256", "preprocessing", "feature_dtype"} <= set(content["provenance"]["clip"])
    timing = content["timing"]
    assert timing["drawing"]["base"]["images_per_second"] > 0 and timing["measuring_seconds"] > 0
    text = (tmp_path / "out" / "metrics.md").read_text()
    assert "- base was generated at " in text and f"- {4 * COUNT} images were measured in " in text
    first = (tmp_path / "out" / "metrics.json").read_bytes()
    (tmp_path / "out" / "metrics.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # without it, everything but the plot
    turned = dict(reversed(sets.items()))
    assert run(turned, tmp_path, "--against", "noisy") == 0
    assert "metrics.png is left out. Plots need matplotlib; run `pip" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.png").exists()
    again = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert again["rows"] == json.loads(first)["rows"]


def test_floor_and_ceiling_are_measured_once(
    sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = compare(sets)
    cache = TableCache(tmp_path / "measured")
    compare({name: sets[name] for name in ("base", "noisy")}, cached=cache.tables)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "load_pipeline", lambda *args: pytest.fail("the ceiling was measured again"))
        again = compare(sets, cached=cache.tables)
    assert list(again.tables) == list(plain.tables)
    for name, table in plain.tables.items():
        np.testing.assert_array_equal(again.tables[name], table)
    shutil.copy(sets["noisy"] / "images/000000.png", sets["base"] / "images/000001.png")  # another floor
    compare(sets, cached=cache.tables)
    assert len(list(cache.folder.iterdir())) == 2


def test_workers_measure_as_one_process(
    sets: dict[str, Path], tmp_path: Path, pickled_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = {name: sets[name] for name in ("base", "noisy")}
    monkeypatch.setattr(compare_module, "_AT_ONCE", 4)
    assert run(sets, tmp_path, "--num_workers", "2") == 0
    shared = json.loads((tmp_path / "out" / "metrics.json").read_text())
    monkeypatch.setattr(compare_module, "spread", spread)
    assert shared["rows"] == as_json(compare(sets, Clip(MICRO_CLIP)), "base")["rows"]


def test_sets_that_differ_are_refused(
    sets: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def changed(name: str, file: str, content: bytes) -> int:
        path = sets[name] / file
        kept = path.read_bytes()
        path.write_bytes(content)
        code = run(sets, tmp_path, "--clip", "none")
        path.write_bytes(kept)
        return code

    settings = json.loads((sets["truth"] / "settings.json").read_text())
    record = json.loads((sets["truth"] / "ids/000001.json").read_text())
    other_mask = (sets["truth"] / "masks/000002.png").read_bytes()
    black = cv2.imencode(".png", np.zeros((128, 128), np.uint8))[1].tobytes()
    differs = "image {} has another key, seed or mask in 'truth' than in 'base'"
    silent = {name: value for name, value in settings.items() if name != "mask"}
    cases: list[tuple[str, Any, str]] = [
        ("settings.json", silent, "does not record mask"),
        ("masks/000003.png", black, differs.format("000003")),
        ("settings.json", settings | {"seed": 5}, "generated with another seed"),
        ("settings.json", settings | {"num_images": 5}, "are unknown"),
        ("ids/000001.json", record | {"key": "other"}, differs.format("000001")),
        ("masks/000001.png", other_mask, differs.format("000001")),
    ]
    for file, content, message in cases:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        assert changed("truth", file, data) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for folder in sets.values():
        shutil.copy(folder / "masks/000004.png", tmp_path / f"kept_{folder.name}.png")
        (folder / "masks/000004.png").write_bytes(black)
    assert run(sets, tmp_path, "--clip", "none") == 2 and "black everywhere" in capsys.readouterr().err
    for folder in sets.values():
        shutil.copy(tmp_path / f"kept_{folder.name}.png", folder / "masks/000004.png")
    without_base = {name: folder for name, folder in sets.items() if name != "base"}
    assert run(without_base, tmp_path) == 2 and "without an adapter" in capsys.readouterr().err
    assert run(sets, tmp_path, "--against", "x") == 2 and "no set 'x'" in capsys.readouterr().err
    assert run({"base": tmp_path / "nowhere"}, tmp_path) == 2 and "There is no folder" in capsys.readouterr().err
    assert evaluate_quantitative_metrics.main(["folder"]) == 2 and "NAME=FOLDER" in capsys.readouterr().err


def test_figures_worsen_with_damage() -> None:
    item = next(s for s in (scene(i, "basic", "test") for i in range(50)) if len(s.objects) == 2 and s.relation)
    mask = np.zeros((128, 128), bool)
    x0, y0, x1, y1 = (int(v) for v in item.objects[0].box)
    mask[max(0, y0 - 3) : y1 + 4, max(0, x0 - 3) : x1 + 4] = True
    target = Target(item.image, mask, item.caption, truth_of(item))
    blank = np.full_like(item.image, 128)
    noise = np.random.default_rng(0).normal(0, 1, item.image.shape)
    rows = [
        measure(image, blank, target, None)
        for image in (item.image, (item.image + 40 * noise).clip(0, 255).astype(np.uint8), blank)
    ]
    f1, error = ([row[name] for row in rows] for name in ("f1", "lfmse_in"))
    assert f1[0] == 1 and f1 == sorted(f1, reverse=True) and f1[2] == 0
    assert error[0] == 0 and error[1] > 0 and error[2] > 0
    assert (rows[0]["region_accuracy"], rows[0]["relation"], rows[2]["region_accuracy"]) == (1, 1, 0)


@pytest.fixture
def comparison() -> Comparison:
    rng = np.random.default_rng(0)
    base = rng.normal(0.5, 0.1, (40, 2))
    better = base + [0.2, 0.0] + rng.normal(0, 0.01, base.shape)
    better[3, 1] = np.nan
    tables = {"base": base, "a_b": better, CEILING: base + 0.4, "none": np.full_like(base, np.nan)}
    return Comparison(("f1", "leak"), tables, [str(i) for i in range(40)], "base", {"metrics": ["f1"]})


def test_tables_say_what_is_undefined_and_what_is_no_difference(comparison: Comparison) -> None:
    text = markdown(comparison, "base")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert "base (floor)" in rows and f"{CEILING} (ceiling)" in rows
    assert ("(-1)" in text and "undefined (-40)" in rows["none"]) or "undefined" in rows["none"]
    difference = comparison.difference("a_b", "base", "f1")
    assert difference is not None and difference.low > 0.19 and f"+{difference.value:.3f}" in rows["a_b"]
    assert rows["a_b"].rstrip(" |").endswith("no difference") and difference.n == 40
    assert comparison.undefined("a_b", "leak") == 1
    tex = latex(comparison)
    assert "a\\_b & $\\mathbf{" in tex and tex.count("\\\\") == 5 and "--" in tex
    json.dumps(as_json(comparison, "base"), allow_nan=False)
    values = comparison.tables["a_b"][:, 1]
    chosen = ranked(comparison, "a_b", "leak")
    assert [what for what, _ in chosen] == ["best"] * 3 + ["median"] * 3 + ["worst"] * 3
    assert chosen[0][1] == np.nanargmax(values) and chosen[-1][1] == np.nanargmin(values)
    assert ranked(comparison, "none", "f1") == []


def test_an_interval_that_covers_zero_is_no_difference() -> None:
    assert verdict(Interval(0.1, -0.01, 0.2, 9)) == "no difference"
    assert verdict(Interval(0.1, 0.01, 0.2, 9)) == "more" and verdict(Interval(-0.1, -0.2, -0.01, 9)) == "less"


def test_names_are_no_markup() -> None:
    assert _escaped("a_b^2~c\\d {e}\nf") == r"a\_b\textasciicircum{}2\textasciitilde{}c\textbackslash{}d \{e\} f"
    assert line(["a|b", "<img src=x>\nnew"]) == r"| a\|b | &lt;img src=x> new |"
