"""The ablation: each row changes one setting, results are measured once, runs resume, and figures are correct."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from localctl.cli.config import CONFIG_DIR, schema_keys
from localctl.evaluation.compare import CEILING
from localctl.evaluation.measuring import Target
from localctl.micro.detect import truth_of
from localctl.micro.scenes import scene
from localctl.settings import ConditionConfig
from localctl.training.loop import NotFiniteError
from localctl.training.settings import TrainSettings
from research.ablation import rows, study
from research.ablation.__main__ import main
from research.ablation.claims import claims_section
from research.ablation.figures import CONTROL, Figures, Resampler, interval, read_figures
from research.ablation.report import write_report
from research.ablation.rows import ROWS, Sweep, row_cells, sweep_cells
from research.ablation.sweep import best, loses
from research.harness import Result, as_rows, write_result

EDGES = {"loss.filter": "edges", "loss.schedule": "low_noise"}
FAINT_EDGES = EDGES | {"loss.weight": 0.1}
FULL = {"adapter.mask_resize": "cover", "proportion_full_masks": 1.0}
# what each row changes of `feature_masked`
CHANGES = {
    "feature_masked": {},
    "plain": {"adapter.mask_features": False},
    "input_masked": {"adapter.mask_features": False, "adapter.mask_condition": True},
    "mse": {"loss.filter": "mse"},
    "sobel": {"loss.filter": "sobel"},
    "sobel_snr": {"loss.filter": "sobel", "loss.schedule": "snr"},
    "sobel_nearest": {"loss.filter": "sobel", "adapter.mask_resize": "nearest"},
    "sobel_inside": {"loss.filter": "sobel", "adapter.mask_resize": "inside"},
    "sobel_cover": {"loss.filter": "sobel", "adapter.mask_resize": "cover"},
    "edges": FAINT_EDGES,
    "logit_normal": {"timestep_sampling": "logit_normal", "logit_mean": 0.2, "logit_std": 0.8},
    "inside_weight": {"loss.masked_denoising_weight": 3.0},
    "cover": {"adapter.mask_resize": "cover"},
    "full": FULL,
    "best": FULL | {"adapter.mask_margin": 8},
    "best_edges": FULL | EDGES | {"adapter.mask_margin": 8, "loss.start": 0.5},
    "cover_edges": {"adapter.mask_resize": "cover", **FAINT_EDGES},
    "cover_edges_late": {"adapter.mask_resize": "cover", **FAINT_EDGES, "loss.start": 0.5},
    "cover_edges_strong": {"adapter.mask_resize": "cover", **EDGES, "loss.weight": 0.5},
}


def value(settings, key):
    for part in key.split("."):
        settings = getattr(settings, part)
    return settings


def test_every_row_is_an_experiment_that_changes_what_its_title_names():
    own = {name for name, row in ROWS.items() if row.trained is None}  # the others sample a training of these
    assert set(CHANGES) == own and all(row.trained in own for row in ROWS.values() if row.trained)
    files = {path.stem.removeprefix("ablation_") for path in (CONFIG_DIR / "experiment").glob("ablation_*.yaml")}
    assert files == own
    trained = {cell.row: cell.settings("micro", "there") for cell in row_cells(sorted(own), [3], None)}
    plain = trained["feature_masked"]
    assert plain.loss.filter == "none" and plain.adapter.mask_features and plain.seed == 3
    for row, settings in trained.items():
        keys = schema_keys(TrainSettings)
        assert {k: value(settings, k) for k in keys if value(settings, k) != value(plain, k)} == CHANGES[row]


def test_headline_rows_are_trained_with_every_seed_and_a_sweep_covers_all():
    cells = row_cells(list(ROWS), [4, 5], 7)
    headline = [name for name, row in ROWS.items() if row.headline]
    assert [cell.row for cell in cells if cell.seed == 5] == headline and {"feature_masked", "sobel"} <= set(headline)
    assert len(cells) == len(ROWS) + len(headline) and cells[0].settings("micro", "x").max_train_steps == 7
    swept = sweep_cells(Sweep([0.01, 0.1], ["constant", "snr"], ["map"], 9), 4)
    losses = [cell.settings("micro", "x").loss for cell in swept]
    assert losses[0].filter == "none"
    assert [(x.weight, x.schedule, x.normalise) for x in losses[1:]] == [
        (0.01, "constant", "map"), (0.1, "constant", "map"), (0.01, "snr", "map"), (0.1, "snr", "map"),
    ]  # fmt: skip
    assert len({cell.name for cell in (*cells, *swept)}) == len(cells) + len(swept)


def flags(base: Path, folder: Path, *more: str) -> list[str]:
    return [
        "--base", str(base), "--count", "4", "--num_inference_steps", "1", "--references", "6", "--extractor",
        "micro_clip", "--report", str(folder / "page.md"), "--work_dir", str(folder / "work"),
        "--train", "train_batch_size=2", "data.count=4", *more,
    ]  # fmt: skip


ROWS_FLAGS = ("--rows", "feature_masked", "sobel", "--max_train_steps", "2")


def test_the_command_makes_every_result_once_and_writes_the_page(sd_folder, tmp_path, capsys, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:  # stopped after the first training, before any image was generated
        patch.setattr(study.Ablation, "generated", stop_at("feature_masked_seed0", study.Ablation.generated))
        with pytest.raises(KeyboardInterrupt):
            main(flags(sd_folder, tmp_path, *ROWS_FLAGS, "--seeds", "0"))
    made = sorted(path.name for path in (tmp_path / "page").glob("*.json"))
    assert made == ["base.json"] and "No two headline rows have both been trained" in (tmp_path / "page.md").read_text()
    shutil.rmtree(tmp_path / "work" / "drawn" / "base")  # as on another machine, where the results alone are
    assert main(flags(sd_folder, tmp_path, *ROWS_FLAGS, "--seeds", "0")) == 0
    names = ["base", "feature_masked_seed0", "sobel_seed0"]
    results = {name: (tmp_path / "page" / f"{name}.json").read_bytes() for name in names}
    page = (tmp_path / "page.md").read_text()
    assert "+ Sobel in the mask (the method) (weight 0.3, constant) against features masked: F1 inside" in page
    assert "1 seed, 4 scenes" in page and "| + Sobel in the mask (the method) | 1 |" in page
    assert "biased upwards" in page and "frechet_micro_clip" in page and "FID" not in page
    for name in ("rows", "pictures"):
        with Image.open(tmp_path / "page" / f"{name}.png") as picture:
            assert picture.width > 400 and f"page/{name}.png" in page
    monkeypatch.setattr(study, "train", None)  # nothing is trained again
    assert main(flags(sd_folder, tmp_path, *ROWS_FLAGS, "--seeds", "0")) == 0
    assert all((tmp_path / "page" / f"{name}.json").read_bytes() == content for name, content in results.items())
    capsys.readouterr()
    other = [flag if flag != "4" else "5" for flag in flags(sd_folder, tmp_path, *ROWS_FLAGS)]
    longer = flags(sd_folder, tmp_path, "--rows", "sobel", "--max_train_steps", "3")
    for argv, words in ((other, "base.json was made with another protocol"), (longer, "another overrides, steps")):
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_one_adapter_is_sampled_in_several_ways_and_trainings_are_shared(
    sd_folder, tmp_path, monkeypatch, make_adapter
):
    """And the objects of the caption are counted inside and outside the mask."""
    monkeypatch.setattr(rows, "GUIDANCES", {"own": {"control_guidance_scale": 3.0}, "3": {"guidance_scale": 3.0}})
    make_adapter(condition=ConditionConfig().recorded()).save_pretrained(tmp_path / "adapter")
    few = ("--rows", "cover", "cover_prompt", "--seeds", "0", "--max_train_steps", "1", "--part", "val")
    trained = []
    train = study.train
    monkeypatch.setattr(study, "train", lambda settings: (trained.append(settings), train(settings))[1])
    assert main(flags(sd_folder, tmp_path, *few, "--guidance", str(tmp_path / "adapter"))) == 0
    assert len({settings.output_dir for settings in trained}) == 1  # of both rows
    images = [tmp_path / "work" / "drawn" / name / "with_prompts" for name in ("cover_seed0", "cover_prompt_seed0")]
    first, second = (json.loads((folder / "settings.json").read_text()) for folder in images)
    assert (first["unconditional_scale"], second["unconditional_scale"]) == (1.0, 0.0) and first["part"] == "val"
    assert first["weights_sha256"] == second["weights_sha256"]
    page = (tmp_path / "page.md").read_text()
    assert "## Guidance" in page and "| own |" in page and "4 validation scenes" in page
    names = sorted(path.name for path in (tmp_path / "work" / "drawn").iterdir())
    assert names == [
        "base", "base_guidance_scale_3", "cover_prompt_seed0", "cover_seed0", "guidance_0", "guidance_1", "reference"
    ]  # fmt: skip
    result = json.loads((tmp_path / "page" / "guidance_0.json").read_text())
    assert result["columns"][-4:] == list(study.OBJECTS) and len(result["samples"][0]) == len(result["columns"])


def test_objects_count_by_where_the_condition_has_them():
    item = next(item for item in map(scene, range(50)) if len(item.objects) == 2 and item.relation is None)
    mask = np.zeros((128, 128), bool)
    x0, y0, x1, y1 = map(int, item.objects[0].box)
    mask[y0:y1, x0:x1] = True
    target = Target(item.image, mask, item.caption, truth_of(item))
    assert study.objects_right(item.image, target) == [1, 1, 1, 1]
    assert study.objects_right(np.full_like(item.image, 128), target) == [0, 0, 0, 0]
    assert np.isnan(study.objects_right(item.image, replace(target, mask=np.ones_like(mask)))[2:]).all()


def stop_at(name, generated):
    def wrapped(self, cell, adapter):
        if cell.name == name:
            raise KeyboardInterrupt
        return generated(self, cell, adapter)

    return wrapped


def test_a_sweep_and_a_training_that_is_not_finite_which_stops_no_other(sd_folder, tmp_path, monkeypatch):
    def fail(settings):
        raise NotFiniteError("The loss is not finite at step 1")

    sweep = ("--sweep_weights", "0.5", "--sweep_schedules", "snr", "--sweep_normalise", "map", "--sweep_steps", "1")
    assert main(flags(sd_folder, tmp_path, "--rows", "--sweep", *sweep)) == 0
    page = (tmp_path / "page.md").read_text()
    assert "| no local term | 0 |" in page and "| snr, map | 0.5 |" in page and "page/sweep_f1.png" in page
    monkeypatch.setattr(study, "train", fail)
    assert main(flags(sd_folder, tmp_path, "--rows", "sobel", "--seeds", "0")) == 0
    assert "sobel_seed0 has no result: The loss is not finite at step 1" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "sobbel"], "no row 'sobbel'"),
        (["--seeds", "1", "1"], "must be different"),
        (["--count", "1"], "count must be at least 2"),
        (["--max_train_steps", "0"], "max_train_steps"),
        (["--sweep", "--sweep_weights", "0"], "above 0"),
        (["--base", "./nowhere"], "nowhere"),
        (["--report", "page"], "call it page.md"),
    ],
)
def test_mistakes_are_one_sentence(more, words, tmp_path, capsys):
    assert main(["--work_dir", str(tmp_path), "--report", str(tmp_path / "page.md"), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


COLUMNS = ("f1", "leak", "clip_score", "color_in")
PROVENANCE = {
    "metrics": ["f1"], "n_real": 9, "n_fake": 9, "image_format": "PNG", "image_size": [128, 128], "mask_protocol": "x",
    "seeds": {"seed": 0}, "versions": {"torch": "2"},
}  # fmt: skip


def made(name, row, seed, f1, kid=0.1, loss=None, ceiling=None):
    f1 = np.asarray(f1, float)
    samples = np.stack([f1, np.zeros_like(f1), f1 * 10, np.ones_like(f1)], axis=1)
    protocol = {"base": "micro", "count": len(f1), "num_inference_steps": 1, "guidance_scale": 2.0, "scheduler": "ddim"}
    ids = tuple(str(i) for i in range(len(f1)))
    about = {
        "name": name, "row": row, "title": name, "seed": seed, "ids": list(ids), "columns": list(COLUMNS),
        "samples": samples.tolist(), "training": {"settings": {"loss": loss or {}}}, "provenance": PROVENANCE,
        "asked": {"protocol": protocol, "steps": 5},
        "ceiling": None if ceiling is None else np.stack([np.full_like(f1, ceiling)] * len(COLUMNS), axis=1).tolist(),
        "distances": {"frechet_micro_clip": 30 + kid, "kid_micro_clip": kid, "kid_error_micro_clip": 0.1},
    }  # fmt: skip
    return Result(name, ids, COLUMNS, samples, about)


def figures_of(*results):
    return Figures({result.name: result for result in results})


def test_means_are_over_seeds_and_scenes_and_differences_are_paired():
    rng = np.random.default_rng(0)
    scenes = rng.uniform(0.3, 0.7, 60)
    base = made("base", "base", 0, np.full(60, 0.2), ceiling=1.0)
    without = [made(f"f{s}", "feature_masked", s, scenes + 0.01 * s) for s in range(3)]
    method = [made(f"s{s}", "sobel", s, scenes + 0.01 * s + 0.05 + 0.001 * rng.normal(size=60)) for s in (1, 2)]
    figures = figures_of(base, *without, *method)
    mean = figures.mean("feature_masked", "f1")
    assert mean.value == pytest.approx(scenes.mean() + 0.01) and mean.low < mean.value < mean.high
    assert figures.mean("feature_masked", CONTROL).value == pytest.approx((mean.value - 0.2) / 0.8)
    assert figures.mean("base", CONTROL).value == 0 and figures.mean(CEILING, CONTROL).value == 1
    paired = figures.difference(
        "sobel", "feature_masked", "f1"
    )  # of seeds 1 and 2 alone: unpaired, the spread of scenes would hide it
    assert figures.common_seeds("sobel", "feature_masked") == [1, 2]
    assert paired.value == pytest.approx(0.05, abs=1e-3) and paired.low > 0.04
    assert dict(figures.per_seed("sobel", "f1"))[2] == pytest.approx(scenes.mean() + 0.07, abs=1e-3)
    assert figures.distance("sobel", "kid_micro_clip") == pytest.approx(0.1)
    assert figures_of(base, *without[:1], *method).difference("sobel", "feature_masked", "f1") is None


def test_seeds_that_differ_widen_the_interval():
    scenes = np.random.default_rng(0).uniform(0.4, 0.6, 100)
    resampler = Resampler(100)
    same, apart = (np.stack([scenes + shift * seed for seed in (-1, 0, 1)]) for shift in (0.0, 0.2))
    narrow, wide = (interval(resampler.means(table), 100) for table in (same, apart))
    assert narrow.value == pytest.approx(wide.value) and wide.high - wide.low > 3 * (narrow.high - narrow.low)
    with_holes = same.copy()
    with_holes[:, :50] = np.nan
    assert resampler.means(with_holes)[0] == pytest.approx(scenes[50:].mean())
    assert interval(resampler.means(np.full((1, 100), np.nan)), 100) is None


def test_the_sweep_chooses_the_best_setting_that_is_not_worse(tmp_path):
    def loss(weight, schedule="constant"):
        return {"weight": weight, "schedule": schedule, "normalise": "map"}

    f1 = np.random.default_rng(0).uniform(0.4, 0.6, 30)
    results = [
        made("base", "base", 0, f1 - 0.2, ceiling=1.0),
        made("sweep_none", "sweep", 0, f1, loss=loss(0.001)),
        made("a", "sweep", 0, f1 + 0.1, loss=loss(0.01)),
        made("b", "sweep", 0, f1 + 0.2, kid=5.0, loss=loss(0.1)),
        made("c", "sweep", 0, f1 + 0.05, loss=loss(0.01, "snr")),
        *(made(f"f{seed}", "feature_masked", seed, f1 + 0.03 * seed) for seed in (0, 1)),
    ]
    figures = figures_of(*results)
    assert best(figures).name == "a" and loses(figures, "b") == ["micro_clip"] and loses(figures, "c") == []
    for result in results:
        write_result(tmp_path / "page" / f"{result.name}.json", result.about)
    text = write_report(tmp_path / "page", tmp_path / "page.md")
    assert "constant, map, weight 0.01: +0.100" in text and "| constant, map | 0.1 |" in text
    assert "Seeds alone move the F1 of `feature_masked` by 0.030" in text
    assert "page/sweep_f1.png" in text and (tmp_path / "page" / "sweep_frechet_micro_clip.png").is_file()
    content = json.loads((tmp_path / "page" / "a.json").read_text())
    for changed, words in (
        ({"provenance": {}}, "does not record its metrics"),
        ({"asked": {"protocol": {"count": 2}}}, "measured in different ways"),
    ):
        (tmp_path / "page" / "a.json").write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match=words):
            read_figures(tmp_path / "page")


def test_a_claim_is_met_missed_or_not_measured():
    f1 = np.random.default_rng(0).uniform(0.7, 0.8, 30)
    base = made("base", "base", 0, f1 - 0.6, ceiling=1.0)

    def claims(**gains):
        rows = [made(f"{row}{s}", row, s, f1 + gain) for row, gain in gains.items() for s in range(3)]
        return claims_section(figures_of(base, *rows))[2:5]

    term, defaults, mask = claims(cover=0.1, cover_prompt=0.1, cover_edges_late_prompt=0.16, plain_prompt=0.14)
    assert (
        "local term: met (3 seeds).** cover + edges in the second half" in term and "F1 +0.060 [+0.060, +0.060]" in term
    )
    assert "Strong control: missed (3 seeds)." in defaults and "cost of the mask: met (3 seeds)." in mask
    term, defaults, mask = claims(cover=0.2, cover_prompt=0.2, cover_edges_late_prompt=0.24, plain_prompt=0.26)
    assert "local term: missed (3 seeds)." in term and "Strong control: met (3 seeds)." in defaults
    assert "cost of the mask: missed (3 seeds)." in mask
    assert all("not measured" in line for line in claims(feature_masked=0.1))
    hint = claims_section(figures_of(base, made("a", "cover", 0, f1), made("b", "cover_edges", 0, f1)))[2]
    assert "local term: missed, a hint of 1 seed." in hint


def test_a_result_has_a_line_for_each_image(tmp_path):
    table = np.array([[0.123456, np.nan], [1.0, 2.0]])
    content = {
        "name": "a",
        "samples": as_rows(table),
        "by row": {"x": as_rows(table, None)},
        "empty": [],
        "n": {"b": 1},
    }
    write_result(tmp_path / "a.json", content)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == content and text.splitlines().count("[1.0, 2.0]") == 2
    assert content["samples"][0] == [0.12346, None] and content["by row"]["x"][0] == [0.123456, None]
