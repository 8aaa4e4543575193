"""Control and leak: the extremes are exact, and the script runs on an untrained base."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import localctl.bases
from localctl.adapter import LocalAdapter
from localctl.boxes import box_iou
from localctl.conditions import ConditionConfig
from localctl.control.image_controls import LocalAdapterControl
from localctl.evaluation.provenance import REQUIRED, check_provenance
from localctl.layout import Layout
from localctl.masks import MaskConfig
from localctl.micro.scenes import scene
from research import harness
from research.control_share.__main__ import main
from research.control_share.study import Case, cases, compare, reproduced, sample_all
from research.micro_base.clip import new_clip, new_tokenizer
from research.micro_base.export import export
from research.micro_base.measure import (
    FLOORS,
    match_objects,
    reader_figures,
    table,
    three_object_figures,
    vae_figures,
)
from research.micro_base.unet import new_unet
from research.micro_base.vae import new_vae


@pytest.fixture(scope="module")
def chosen() -> list[Case]:
    return cases(30, MaskConfig(kind="box"))


@pytest.fixture(scope="module")
def micro_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "micro"
    tokenizer = new_tokenizer()
    export(folder, new_vae(), new_clip(tokenizer), tokenizer, new_unet())
    return folder


def empty(like: np.ndarray) -> np.ndarray:
    return np.full_like(like, 128)


def test_cases_are_fixed_and_hold_enough_edges(chosen: list[Case]) -> None:
    again = cases(30, MaskConfig(kind="box"))
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(chosen, again, strict=True))
    assert all(case.edges[case.inside].sum() >= 40 for case in chosen)
    other = cases(30, MaskConfig(kind="box"), seed=1)
    assert not all(torch.equal(a.mask, b.mask) for a, b in zip(chosen, other, strict=True))


def test_hidden_objects_keep_their_distance(chosen: list[Case]) -> None:
    hidden = [(case, item) for case in chosen for item in case.hidden]
    assert hidden
    for case, item in hidden:
        ys, xs = np.nonzero(case.inside)
        gap_x = max(item.box[0] - (xs.max() + 1), xs.min() - item.box[2])
        gap_y = max(item.box[1] - (ys.max() + 1), ys.min() - item.box[3])
        assert max(gap_x, gap_y) >= 8


def test_the_scene_itself_is_full_control_and_the_base_none(chosen: list[Case]) -> None:
    truth = np.stack([case.item.image for case in chosen])
    base = empty(truth)
    full = compare("truth", chosen, base, truth, truth)
    assert full.f1_base.value == 0 and full.f1_adapter.value == 1 and full.control.value == pytest.approx(1)
    none = compare("base", chosen, base, truth, base)
    assert none.control.value == 0 and none.leak is not None and none.leak.value == 0


def test_a_copy_of_the_whole_scene_leaks_and_a_masked_one_does_not(chosen: list[Case]) -> None:
    truth = np.stack([case.item.image for case in chosen])
    masked = truth.copy()
    for image, case in zip(masked, chosen, strict=True):
        image[~case.inside] = np.median(image.reshape(-1, 3), axis=0)
    copied = compare("copy", chosen, empty(truth), truth, truth).leak
    clean = compare("masked", chosen, empty(truth), truth, masked).leak
    assert copied is not None and copied.value > 0.95
    assert clean is not None and clean.value == 0


def test_reproduced_looks_at_shape_and_place() -> None:
    case = next(c for c in cases(20, MaskConfig(kind="box")) if len(c.hidden) == 1)
    assert reproduced(case, case.item.image) == 1
    assert reproduced(case, case.item.image[::-1, ::-1].copy()) == 0


def test_box_iou() -> None:
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_the_script_writes_table_figures_and_sheet(
    micro_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = LocalAdapter(in_channels=1, channels=[64, 96, 160], condition={"kind": "canny", "low": 50, "high": 100})
    adapter.save_pretrained(tmp_path / "adapter")
    flags = ["--adapter", str(tmp_path / "adapter"), "--base", str(micro_base), "--count", "3"]
    assert main([*flags, "--num_inference_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "control.json").read_text())
    check_provenance("control", content, REQUIRED)
    assert content["results"][0]["f1_ceiling"]["n"] == 3
    assert (tmp_path / "out" / "sheet_0.png").exists() and "| control |" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["depth", "segmentation"])
def test_conditions_that_come_with_the_scene_are_measured_too(
    kind: str, chosen: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ConditionConfig(kind=kind)
    adapter = LocalAdapter(in_channels=settings.channels, channels=[8], condition={"kind": kind})
    seen: list[LocalAdapterControl] = []

    def generated(
        pipe: Any, layouts: list[Layout], controls: list[LocalAdapterControl], *rest: Any, **more: Any
    ) -> Any:
        seen.extend(controls)
        return SimpleNamespace(images=[case.item.image for case in chosen[5:8]])

    monkeypatch.setattr(harness, "generate", generated)
    sample_all(None, chosen[5:8], adapter, {"batch_size": 4}, unconditional_scale=0.5)
    assert seen[0].unconditional_scale == 0.5
    items = [case.item for case in chosen[5:8]]
    truth = [item.depth[None] if kind == "depth" else item.segmentation.transpose(2, 0, 1) / 255 for item in items]
    assert np.abs(seen[0].condition.numpy() - np.stack(truth)).max() < 0.003


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--count", "0"], "--count must be at least 1"),
        (["--base", "sd15"], "was trained on the base micro, does not fit sd15"),
        (["--scheduler", "dimm"], "Unknown scheduler 'dimm'"),
        (["--output_dir", "file/out"], "output folder file/out cannot be made"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    flags: list[str],
    words: str,
    micro_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(localctl.bases.BASES, "micro", localctl.bases.BaseSpec("micro", str(micro_base)))
    Path("file").write_text("")
    LocalAdapter(in_channels=1, channels=[64, 96, 160], condition={"kind": "canny"}, base="micro").save_pretrained("a")
    assert main(["--adapter", "a", *flags]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_a_missing_adapter_is_one_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--adapter", str(tmp_path / "nowhere")]) == 2
    message = capsys.readouterr().err.strip()
    assert "nowhere" in message and len(message.splitlines()) == 1


def test_report_figures_see_what_is_wrong() -> None:
    scenes = [scene(i, "basic", "test") for i in range(12)]
    images = [s.image for s in scenes]
    right, spurious, background = reader_figures(scenes, images)
    assert right.value == 1 and spurious == 0 and background == 1
    assert reader_figures(scenes, images[::-1])[0].value < 0.3
    psnr, f1 = vae_figures(np.stack(images), np.stack(images[::-1]))
    assert psnr.value < 20 and f1.value < 0.5
    noisy = np.stack(images).astype(int) + np.random.default_rng(0).integers(-3, 4, np.stack(images).shape)
    psnr, f1 = vae_figures(np.stack(images), noisy.clip(0, 255).astype(np.uint8))
    assert psnr.value == pytest.approx(10 * np.log10(255**2 / 4), abs=0.5) and f1.value > 0.97


def test_matching_needs_phrase_and_place() -> None:
    from localctl.micro.detect import detect

    item = scene(1)
    assert match_objects(item, detect(item.image)) == (len(item.objects), 0)
    turned = detect(item.image[:, ::-1].copy())
    assert match_objects(item, turned)[0] < len(item.objects)


def test_three_objects_are_right_together_or_in_part() -> None:
    from localctl.micro.detect import Reading, detect
    from research.harness import first_scenes

    scenes = first_scenes(2, lambda item: len(item.objects) == 3)
    whole, part = (detect(item.image) for item in scenes)
    figures = three_object_figures(scenes, [whole, Reading(part.background, part.objects[1:])])
    assert figures["three objects: all right"].value == 0.5
    assert figures["three objects: share right"].value == pytest.approx(5 / 6)


def test_figures_of_images_alone_make_no_card_and_never_replace_the_shipped_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from research.micro_base import measure, report

    figures = {"three objects: all right": 0.25}
    images = {"a": Image.new("RGB", (8, 8))}
    monkeypatch.setattr(measure, "generated_figures", lambda pipe, share, guidance: (figures, images))
    assert report.main(["--images_only", "--output_dir", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == figures
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report_a.png"}
    assert report.main(["--images_only"]) == 2
    assert "give --output_dir" in capsys.readouterr().err


def test_the_table_says_which_floor_is_missed() -> None:
    name = "CLIP: top-1 of 512 captions"
    assert f"| {name} | 0.100 | >= {FLOORS[name]} | no |" in table({name: 0.1})
    assert f"| {name} | 0.900 | >= {FLOORS[name]} | yes |" in table({name: 0.9})
