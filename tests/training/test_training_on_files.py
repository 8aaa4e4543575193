"""Training on data from files: the sources agree, bad rows do not disturb, crops never meet another crop's latents."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from log_helpers import logged
from PIL import Image
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.cli import train as train_adapter
from localctl.cli.config import load_config
from localctl.conditions import ConditionConfig
from localctl.data import DataConfig, SampleRef, TooManyBadRows, collate, files, open_files
from localctl.training.models import load_models
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings
from localctl.training.summary import size_note

sys.path.append(str(Path(__file__).parents[1] / "data"))
from file_data import read_metadata, to_folders, to_parquet, write_imagefolder, write_metadata

DEPTH = ConditionConfig(kind="depth")
TEN = {"validation_share": 0, "resolution": 64, "max_bad_fraction": 0.2}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    root = write_imagefolder(tmp_path / "data", 10)
    rng = np.random.default_rng(0)
    for file in sorted(root.glob("*/*.png")):  # something to see
        Image.fromarray(rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)).save(file)
    return root


def run(base, folder, data, **changes):
    said = logged()
    settings = tiny_settings(base, folder, data=data, **({"condition": DEPTH} | changes))
    result = silent_run(settings).train()
    return result, loss_log(folder), said


def test_every_source_trains_and_says_what_it_is(sd_folder, folder, tmp_path):
    table = to_parquet(folder, tmp_path / "tables" / "all.parquet")
    sources = {
        "imagefolder": DataConfig(path=str(folder), **TEN),
        "parquet": DataConfig(name="parquet", path=str(table), **TEN),
        "folder": DataConfig(name="folder", path=str(to_folders(folder, tmp_path / "folders")), **TEN),
        "wide": DataConfig(path=str(folder), **(TEN | {"resolution": (64, 96)}), center_crop=False, random_flip=True),
    }
    logs = {}
    for name, data in sources.items():
        result, logs[name], said = run(sd_folder, tmp_path / name, data, max_train_steps=2)
        assert result.step == 2 and len(logs[name]) == 2
        assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in logs[name])
        assert "obeyed inside the data's masks" in said[0]
        assert "| masks | of the data |" in (tmp_path / name / "README.md").read_text()
        assert "masks from 'mask'" in said[0] and f"{data.name} {data.path}" in said[0]
    assert logs["imagefolder"] == logs["parquet"]
    assert logs["imagefolder"] != logs["folder"]  # a JPEG, and keys of another kind


def test_rows_are_looked_up_once_for_training_and_validation(sd_folder, folder, tmp_path, monkeypatch):
    opened, open_rows = [], files.open_rows
    monkeypatch.setattr(files, "open_rows", lambda *place: opened.append(place) or open_rows(*place))
    data = DataConfig(path=str(folder), **(TEN | {"validation_share": 0.5}))
    silent_run(tiny_settings(sd_folder, tmp_path / "out", data=data, condition=DEPTH, validation_steps=1))
    assert len(opened) == 1


def test_the_flags_are_those_of_diffusers(folder):
    def data(*argv):
        return load_config(argv, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS).data

    hub = data(
        "--dataset_name", "user/set", "--image_column=photo", "--caption_column", "null", "--resolution", "[64, 96]"
    )
    assert (hub.name, hub.path, hub.image_column, hub.caption_column) == ("user/set", None, "photo", None)
    assert hub.size == (64, 96) and hub.count is None
    local = data("--train_data_dir", str(folder), "--max_train_samples", "7", "--conditioning_image_column", "pose")
    assert (local.name, local.count, local.conditioning_image_column) == ("imagefolder", 7, "pose")
    assert data("data=parquet", "data.path=x").name == "parquet"
    assert data() == DataConfig(count=3000) and data("data=micro_rich").profile == "rich"
    with pytest.raises(ValueError, match="image_column"):
        data("--image_colum", "x")


def spoil(folder):
    (folder / "images" / "001.png").write_bytes(b"<html>")
    lines = read_metadata(folder)
    lines[7]["text"] = None
    lines[8]["text"] = "long " * 90
    write_metadata(folder, lines)
    return DataConfig(path=str(folder), **TEN)


def quarantined(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_bad_rows_are_listed_alike_with_workers_and_after_a_resume(sd_folder, folder, tmp_path):
    data = spoil(folder)
    _result, log, said = run(sd_folder, tmp_path / "a", data, max_train_steps=5)
    rows = quarantined(tmp_path / "a")
    assert sorted(row["key"] for row in rows) == ["images/001.png", "images/007.png"]
    assert {row["reason"] for row in rows} == {"image of unknown format", "caption missing"}
    assert any("2 of 10 rows unusable and replaced" in line for line in said)
    assert any("1 captions seen were longer than 77 tokens" in line for line in said)
    _, other, _ = run(sd_folder, tmp_path / "b", data, max_train_steps=5, dataloader_num_workers=2)
    assert other == log and quarantined(tmp_path / "b") == rows
    settings = tiny_settings(sd_folder, tmp_path / "c", data=data, condition=DEPTH, max_train_steps=5)
    silent_run(settings).train(stop=lambda step: step == 1)
    silent_run(replace(settings, resume_from_checkpoint="latest")).train()
    assert loss_log(tmp_path / "c") == log and quarantined(tmp_path / "c") == rows


def test_too_many_bad_rows_stop_the_run_with_the_list(sd_folder, folder, tmp_path, capsys):
    data = spoil(folder)
    with pytest.raises(TooManyBadRows, match=r"of 10 rows .*_fraction=0.1 .*quarantine.jsonl.*00\d.png"):
        run(sd_folder, tmp_path / "a", replace(data, max_bad_fraction=0.1), max_train_steps=5)
    assert len(quarantined(tmp_path / "a")) == 2
    argv = [
        f"base={sd_folder}", "--train_data_dir", str(folder), "--resolution", "64", "data.validation_share=0",
        "condition=depth", "--output_dir", str(tmp_path / "b"), "--validation_steps", "0", "--train_batch_size", "4",
        "--max_train_steps", "5", "--report_to", "none", "data.max_bad_fraction=0.1", "--dataloader_num_workers", "2",
    ]  # fmt: skip
    assert train_adapter.main(argv) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train_adapter.py")]
    assert len(error) == 1 and "max_bad_fraction" in error[0]
    for file in (folder / "images").iterdir():
        file.write_bytes(b"")
    assert train_adapter.main([*argv, "--overwrite_output_dir"]) == 2
    assert "No usable row was found" in capsys.readouterr().err


def test_no_crop_gets_the_latents_of_another(sd_folder, folder, tmp_path):
    def encoder(keep, **options):
        data = DataConfig(path=str(folder), **TEN, **options)
        settings = tiny_settings(sd_folder, tmp_path, data=data, condition=DEPTH)
        models = load_models(settings, torch.device("cpu"), None)
        models.keep_encodings(20, (64, 64), images=keep and data.latents_may_be_kept)
        return models, open_files(data, DEPTH, "train")

    def latents(models, source, epoch):
        batch = collate([replace(source.visit(SampleRef(0, epoch), 0))])
        return models.encode(batch, torch.zeros(1, *models.latent_shape(64, 64)))

    for options in ({"center_crop": False}, {"random_flip": True}):
        models, source = encoder(True, **options)
        fresh, _ = encoder(False, **options)
        assert ("images" in models.kept, "images" in fresh.kept) == ("random_flip" in options, False)
        seen = []
        for epoch in range(6):
            kept = latents(models, source, epoch)
            assert torch.equal(kept, latents(fresh, source, epoch))
            seen.append(kept)
        assert any(not torch.equal(seen[0], other) for other in seen[1:])


def test_validation_needs_held_out_rows_and_skips_bad_ones(sd_folder, folder, tmp_path):
    data = DataConfig(path=str(folder), **(TEN | {"validation_share": 0.4}))
    val = open_files(data, DEPTH, "val")
    (folder / val.key(0)).write_bytes(b"")
    result, _, _ = run(sd_folder, tmp_path / "a", data, max_train_steps=1, validation_steps=1)
    assert result.fidelity is not None and len(result.fidelity.per_case) == min(2, len(val) - 1)
    with pytest.raises(ValueError, match="None of the 10 rows .* --validation_steps 0"):
        run(sd_folder, tmp_path / "b", replace(data, validation_share=0), validation_steps=1)
    assert not (tmp_path / "b").exists()


def test_a_small_set_of_odd_captions_trains_and_validates_with_the_defaults(sd_folder, folder, tmp_path):
    lines = read_metadata(folder)
    odd = ["one\ntwo", "word " * 20_000, "\tשלום\u202e", "\U0001f600", "a\x00b", "c\u2028d\x85e", "\n.\n" * 900]
    for number, line in enumerate(lines):
        line["text"] = odd[number % len(odd)]
    write_metadata(folder, lines[:9])
    data = DataConfig(path=str(folder), resolution=64, mask_column=None)
    assert data.validation_share == 0.05
    for workers in (0, 2):
        changes = {"validation_steps": 1, "max_train_steps": 2, "dataloader_num_workers": workers}
        result, log, said = run(sd_folder, tmp_path / f"run{workers}", data, report_to="tensorboard", **changes)
        assert result.step == 2 and len(log) == 2
        assert len(list((tmp_path / f"run{workers}" / "validation").glob("*.png"))) == 2
        assert "8 examples of imagefolder" in said[0] and "so one is held out for validation: images/" in said[0]
        assert "3 images in" in said[0] and "have no line in metadata.jsonl" in said[0]


def test_empty_masks_and_a_validation_without_score_are_said(sd_folder, folder, tmp_path):
    for file in (folder / "masks").iterdir():
        Image.new("L", (100, 70)).save(file)
    data = DataConfig(path=str(folder), **(TEN | {"validation_share": 0.3}))
    result, _log, said = run(sd_folder, tmp_path / "a", data, max_train_steps=2, validation_steps=2)
    assert any("8 of 8 masks seen were empty" in line for line in said)
    assert any("step 2: no score, since no held-out mask has 40 edge pixels" in line for line in said)
    assert result.fidelity is not None and not result.fidelity.scored
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Not scored" in card and "step-000002.png" in card and "nan" not in card.lower()


def test_the_default_size_is_said_where_it_is_not_the_bases_own(tmp_path):
    assert "--resolution 128" in size_note(DataConfig(path="x"), "micro")
    assert size_note(DataConfig(path="x", resolution=64), "micro") == ""
    assert size_note(DataConfig(), "micro") == "" and size_note(DataConfig(path="x"), "owner/unknown") == ""
