"""The layout benchmark: cases are held out and unambiguous, results are measured once, and gates are correct."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from localctl.control.dense import DenseModulation
from localctl.control.layout_guidance import LayoutGuidance
from localctl.control.presets import PRESETS
from localctl.control.region_bias import RegionBias
from localctl.files import sha256
from localctl.layout import Layout, Region
from localctl.micro.scenes import scene
from localctl.pipelines import load_pipeline
from localctl.sampling_settings import Sampling
from research.harness import Result
from research.layout_benchmark import study
from research.layout_benchmark.__main__ import main
from research.layout_benchmark.attention import KINDS, attention_of, token_kinds
from research.layout_benchmark.cases import COLUMNS, Case, cases, read
from research.layout_benchmark.cost import MIB, compare_cost, peak_memory
from research.layout_benchmark.figures import Figures, gates, ranked, read_figures
from research.layout_benchmark.methods import METHODS, grids, methods, preset_words
from research.layout_benchmark.report import write_report

CPU = torch.device("cpu")


def test_layouts_are_held_out_and_the_prompt_names_the_objects_alone() -> None:
    found = cases(12, "test")
    assert [len(case.objects) for case in found] == [2, 1, 2, 3] * 3
    assert len({case.id for case in found}) == 12
    assert found[:8] == cases(8, "test") and not {c.id for c in found} & {c.id for c in cases(12, "val", (2,))}
    for case in found:
        item = case.item
        assert case.id == f"test-{item.index}" and item.caption == scene(item.index, "basic", "test").caption
        for thing, region, box, wanted in zip(item.objects, case.layout.regions, case.boxes, case.objects, strict=True):
            assert region.phrase == thing.phrase == " ".join(wanted) and box == pytest.approx(thing.box)
            assert case.layout.prompt.count(thing.phrase) == 1
        assert not any(word in case.layout.prompt for word in ("left", "right", "above", "below"))


def test_a_true_scene_is_all_right_and_a_wrong_one_is_not() -> None:
    case = cases(1, "test")[0]
    image = case.item.image
    figures = dict(zip(COLUMNS, read(image, case), strict=True))
    assert figures.pop("iou") > 0.9 and figures.pop("color_iou") > 0.9 and set(figures.values()) == {1.0}
    moved = replace(case, layout=replace(case.layout, regions=tuple(_moved(r) for r in case.layout.regions)))
    figures = dict(zip(COLUMNS, read(image, moved), strict=True))
    assert figures["right"] == figures["accuracy"] == figures["color_right"] == 0 and figures["present"] == 1
    other = {"circle": "star", "star": "ring"}
    renamed = replace(case, objects=tuple((color, other.get(shape, "circle")) for color, shape in case.objects))
    figures = dict(zip(COLUMNS, read(image, renamed), strict=True))
    assert figures["right"] == figures["present"] == 0 and figures["color_right"] == 1  # the shape is not asked for
    blank = dict(zip(COLUMNS, read(np.full_like(image, 128), case), strict=True))
    assert np.isnan(blank["binding"]) and blank["iou"] == 0


def _moved(region: Region) -> Region:
    left, top, right, bottom = region.boxes[0]
    turned = (1 - right, 1 - bottom, 1 - left, 1 - top)
    far = turned if abs(turned[0] - left) + abs(turned[1] - top) > 0.6 else (0.0, 0.0, 0.1, 0.1)
    return replace(region, box=far)


def test_binding_is_colour_and_shape_on_one_object() -> None:
    """With swapped colours, both colours and both shapes are there, but in the wrong pairs."""
    item = next(s for i in range(200) if len((s := scene(i, "basic", "test")).objects) == 2 and _differ(s))
    (a, b), boxes = item.objects, [tuple(v / 128 for v in o.box) for o in item.objects]

    def bound(pairs: list[tuple[str, str]]) -> float:
        prompt = " and ".join(f"a {color} {shape}" for color, shape in pairs)
        regions = tuple(Region(f"{c} {s}", box) for (c, s), box in zip(pairs, boxes, strict=True))
        case = Case("x", item, Layout(prompt, 128, 128, regions), 0, tuple(pairs))
        return dict(zip(COLUMNS, read(item.image, case), strict=True))["binding"]

    assert bound([(a.color, a.shape), (b.color, b.shape)]) == 1
    assert bound([(a.color, b.shape), (b.color, a.shape)]) == 0


def _differ(item: Any) -> bool:
    first, second = item.objects
    return first.color != second.color and first.shape != second.shape


def test_methods_are_labeled_as_for_compare_and_grids_cover_all() -> None:
    found = methods(METHODS, ["bias.strength=0.7"], "micro")
    assert [m.name for m in found] == ["none", "none ddpm 4", *METHODS[1:]] and found[0].controls == ()
    own, fixed = Sampling("ddpm", 4.0), Sampling("euler")
    assert {m.name for m in found if m.sampling == own} == {
        "none ddpm 4",
        "bias",
        "dense",
        "forward",
        "bias+dense",
        "bias+guidance",
    }
    of_all = [m.name for m in methods(["none", "all", "forward"], [], "micro", fixed)]
    assert of_all == ["none", "none 4", "bias", "dense", "guidance", "forward"]
    assert [m.name for m in methods(["bias"], [], "micro", fixed)] == ["none", "none 4", "bias"]
    assert [m.name for m in methods(["bias"], [], "micro", Sampling("ddim", 2.0))] == ["none", "bias"]
    assert [m.name for m in grids(["bias"], ["bias.strength=3"], "micro")] == [
        "none",
        "none ddpm 4",
        "bias",
        "bias strength=3",
    ]
    by_name = {m.name: m for m in found}
    tuned_bias = {**PRESETS["micro"]["bias"], "strength": 0.7}
    assert by_name["bias"].controls == (RegionBias(**tuned_bias),)
    assert [type(c) for c in by_name["bias+guidance"].controls] == [RegionBias, LayoutGuidance]
    tuned = grids(["guidance", "dense"], ["guidance.scale=1,2", "guidance.end=.5,.7", "guidance.sites=mid"], "micro")
    scales = [(c.scale, c.end) for m in tuned for c in m.controls if isinstance(c, LayoutGuidance) and m.settings]
    assert scales == [(1, 0.5), (1, 0.7), (2, 0.5), (2, 0.7)]
    last = [m for m in tuned if m.name.startswith("guidance ")][-1]
    changed = {"sites": ("mid",), "scale": 2.0, "end": 0.7}
    assert preset_words(last, "micro") == {**PRESETS["micro"]["guidance"], **changed}
    assert any(isinstance(c, DenseModulation) and c.rest == "segment" for m in tuned for c in m.controls)
    assert len({m.name for m in tuned}) == len(tuned)
    json.dumps([m.described() for m in tuned])
    for grid, message in ((["scale=1"], "not an axis of a grid"), (["bias.scale=1"], "no setting 'scale'")):
        with pytest.raises(ValueError, match=message):
            grids(["bias"], grid, "micro")
    with pytest.raises(ValueError, match="no control 'biass' to tune"):
        grids(["biass"], [], "micro")
    with pytest.raises(ValueError, match="no grid for 'spacetime'; give --grid spacetime.NAME"):
        grids(["spacetime"], [], "micro")
    assert len(grids(["spacetime"], ["spacetime.weight=0.5,1"], "micro")) == 5


def result(name: str, right: list[list[float]], counts: list[int], frechet: float = 10.0) -> Result:
    samples = np.array(right).reshape(-1, 1).repeat(4, axis=-1)
    columns = ("right", "accuracy", "color_right", "color_iou")
    ids = tuple(map(str, range(len(right))))
    about = {"counts": counts, "distances": {"frechet_micro_clip": frechet}, "asked": {}}
    return Result(name, ids, columns, samples, about)


def test_gates_are_gains_over_plain_with_two_regions_and_a_fair_distance() -> None:
    counts = [2] * 50 + [1] * 50
    plain = result("none", [[0, 0]] * 100, counts)
    half = result("guidance", [[1, 0]] * 50 + [[0, 0]] * 50, counts)  # +0.5 with two regions
    weak = result("bias", [[1, 0]] * 10 + [[0, 0]] * 40 + [[1, 1]] * 50, counts)  # +0.1, whatever one region does
    ugly = result("dense", [[1, 1]] * 100, counts, frechet=16.0)
    figures = Figures({r.name: r for r in (plain, half, weak, ugly)})
    found = {gate.name: gate for gate in gates(figures)}
    assert {name: gate.met for name, gate in found.items()} == {"guidance": True, "bias": False, "dense": False}
    gain = found["guidance"].gain
    assert gain is not None and (gain.value, gain.low, gain.high, gain.n) == (0.5, 0.5, 0.5, 50)
    assert "bias: MISSED: +0.100 [" in str(found["bias"]) and "1.60 times" in str(found["dense"])
    assert ranked(figures) == ["guidance", "bias", "none", "dense"]
    pairs = [result("bias+dense", [[0, 0]] * 100, counts), result("bias+guidance", [[1, 1]] * 100, counts)]
    assert Figures({r.name: r for r in (plain, *pairs)}).several == ["bias+guidance", "bias+dense"]
    with pytest.raises(ValueError, match="Plain sampling has no result"):
        Figures({"bias": weak})


def test_methods_are_compared_with_plain_sampling_of_their_own_way() -> None:
    counts = [2] * 50
    own = {"sampling": {"scheduler": "ddpm", "guidance_scale": 4.0}}
    plain, other = result("none", [[0, 0]] * 50, counts), result("none ddpm 4", [[1, 0]] * 50, counts, frechet=5.0)
    bias, dense = result("bias", [[1, 1]] * 50, counts), result("dense", [[1, 1]] * 50, counts)
    both = {"none": plain, "dense": dense}
    both |= {item.name: replace(item, about={**item.about, "asked": own}) for item in (other, bias)}
    figures = Figures(both)
    gains = {name: figures.difference(name, "right", 2) for name in ("bias", "dense")}
    assert {name: gain.value for name, gain in gains.items() if gain is not None} == {"bias": 0.5, "dense": 1.0}
    assert (figures.frechet("bias"), figures.frechet("dense")) == (2.0, 1.0)
    with pytest.raises(ValueError, match="bias was generated with .*ddpm.* and plain sampling was not"):
        Figures({"none": plain, "bias": both["bias"]})


def test_seeds_of_a_layout_are_resampled_together_and_undefined_ones_left_out() -> None:
    rows = [[1.0, 1.0], [0.0, 0.0]] * 50
    mean = Figures({"none": result("none", rows, [2] * 100)}).mean("none", "right")
    single = Figures({"none": result("none", [[row[0]] for row in rows], [2] * 100)}).mean("none", "right")
    assert mean == single  # not narrower for being there twice
    undefined = result("none", [[np.nan, 1.0], [np.nan, np.nan], [0.0, 0.0]], [1, 2, 1])
    figures = Figures({"none": undefined})
    found = figures.mean("none", "right")
    assert found is not None and found.value == 0.5 and found.n == 2 and figures.mean("none", "right", 2) is None


QUICK = ["--layouts", "2", "--seeds", "4", "--num_inference_steps", "1", "--references", "6", "--batch_size", "2"]


def test_the_command_measures_goes_on_and_writes_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, work = tmp_path / "page.md", tmp_path / "work"
    monkeypatch.setattr(study, "compare_cost", partial(compare_cost, repeats=1))
    flags = [*QUICK, "--report", str(page), "--output", str(work)]
    assert main([*flags, "--methods", "bias"]) == 0
    said = capsys.readouterr().out
    assert "bias: MISSED" in said and "padding" in said
    folder = tmp_path / "page"
    content = json.loads((folder / "bias.json").read_text())
    assert np.array(content["samples"], dtype=float).shape == (2, 9) and content["cost"]["seconds"] > 0
    assert content["provenance"]["n_real"] == 6 and sum(content["attention"][kind] for kind in KINDS) == pytest.approx(
        1, abs=1e-3
    )
    (folder / "bias.json").unlink()
    lost, kept = sorted((work / "bias").glob("*.png"))
    lost.unlink()
    before = sha256(kept), kept.stat().st_mtime_ns
    assert main([*flags, "--methods", "bias"]) == 0
    said = capsys.readouterr().out
    assert "none: done before" in said and "none ddpm 4: done before" in said and "bias: 1 of 1 images" in said
    assert (sha256(kept), kept.stat().st_mtime_ns) == before and lost.is_file()
    again = json.loads((folder / "bias.json").read_text())
    assert again["asked"] == content["asked"]
    first, second = (np.array(item["samples"], dtype=float) for item in (content, again))
    assert np.array_equal(first, second, equal_nan=True)  # in the same batch as before
    text = page.read_text()
    assert "| bias |" in text and "MISSED" in text and "where it looks" in text
    assert Image.open(folder / "pictures.png").width > 2 * 256 and (folder / "bars.png").is_file()
    assert write_report(folder, page) == text
    assert main([*flags, "--methods", "bias", "--set", "strength=3"]) == 2
    assert "was made with another controls" in capsys.readouterr().err

    before = json.loads((folder / "bias.json").read_text())  # as if the reader had been mended since
    before["asked"]["reader"] -= 1
    (folder / "bias.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match="measured in different ways"):
        read_figures(folder)
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "asked": {**content["asked"], "reader": before["asked"]["reader"]}}))
    for path in (folder / "bias.json", work / "bias" / "drawn.json"):  # as if a setting had been added since
        content = json.loads(path.read_text())
        del content.get("asked", content)["controls"][0]["std"]
        path.write_text(json.dumps(content))
    assert main([*flags, "--methods", "bias"]) == 0
    assert f"Read by version {before['asked']['reader']} of the reader" in page.read_text()
    assert main([*flags, "--methods", "bias", "dense"]) == 2
    assert "choose another --report for dense, or remove them" in capsys.readouterr().err


def test_a_damaged_or_foreign_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a result of the layout benchmark"):
        read_figures(tmp_path)


def test_tuning_uses_other_layouts_and_names_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*QUICK, "--report", str(tmp_path / "tuned.md"), "--output", str(tmp_path / "work")]
    assert main([*flags, "--tune", "bias", "--grid", "bias.strength=0,3", "bias.outside_strength=0"]) == 0
    said = capsys.readouterr().out
    assert '"bias": {' in said and "bias: right" in said
    content = json.loads((tmp_path / "tuned" / "bias_strength=0_outside_strength=0.json").read_text())
    assert all(name.startswith("val-") for name in content["ids"]) and content["counts"] == [2, 2]
    plain = json.loads((tmp_path / "tuned" / "none_ddpm_4.json").read_text())
    assert content["samples"] == plain["samples"] and content["cost"] == {}
    text = (tmp_path / "tuned.md").read_text()
    assert "| strength=3 outside_strength=0 |" in text and "| preset |" in text and "| none ddpm 4 |" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "biass"], "Unknown control 'biass'"),
        (["--layouts", "1"], "layouts must be at least 2"),
        (["--seeds", "1", "1"], "seeds must be different"),
        (["--grid", "bias.strength=1"], "add --tune"),
        (["--report", "page"], "call it page.md"),
        (["--device", "gpu7"], "device 'gpu7' cannot be used"),
        (["--tune", "biass"], "no control 'biass' to tune"),
        (["--base", "nowhere"], "no base 'nowhere'"),
    ],
)
def test_bad_input_is_one_sentence(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_kinds_of_tokens_and_attention_inside() -> None:
    pipe = load_pipeline("micro")
    pipe.set_progress_bar_config(disable=True)
    layout = Layout("a red circle and a blue star", 128, 128, (Region("red circle", (0, 0, 0.5, 0.5)),))
    kinds = token_kinds(pipe, layout)
    length = len(pipe.tokenizer(layout.prompt).input_ids)
    assert kinds.sum(dim=1).eq(1).all()
    assert kinds.sum(dim=0).tolist()[2:] == [1, 1, 77 - length]
    assert kinds[0, KINDS.index("start")] == kinds[length - 1, KINDS.index("end")] == 1
    assert kinds[:, KINDS.index("phrases")].sum() >= 2
    options = {"num_inference_steps": 1}
    plain = attention_of(pipe, [layout], (), 0, **options)
    biased = attention_of(pipe, [layout], (RegionBias(strength=2.0, outside_strength=1.0),), 0, **options)
    assert sum(plain[kind] for kind in KINDS) == pytest.approx(1)
    assert plain["area"] == pytest.approx(0.25) and biased["inside"] > plain["inside"] + 0.1


def test_cost_tells_slow_from_fast_and_large_from_small() -> None:
    small, large = torch.randn(60, 60), torch.randn(600, 600)
    cost = compare_cost(lambda: [large @ large for _ in range(4)], lambda: small @ small, CPU)
    assert cost.overhead > 2 and cost.seconds > 0
    peak = peak_memory(lambda: torch.ones(40 * MIB // 4).sum(), CPU)
    assert peak is None or 30 < peak < 80
