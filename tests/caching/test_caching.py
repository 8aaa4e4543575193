"""Encodings are computed once, trained from as if computed live, and found wrong before anything slow."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from caching_helpers import cache_settings, contents, data_with
from file_data import write_imagefolder
from PIL import Image
from pyarrow import parquet
from training_helpers import loss_log, silent_run, tiny_settings

from localctl.caching import run, workers
from localctl.caching.cache import cache
from localctl.caching.estimate import report
from localctl.caching.run import run_workers
from localctl.caching.settings import CacheSettings
from localctl.caching.workers import Work, rows_of
from localctl.data import DataConfig, SampleRef
from localctl.encodings.source import caption_id
from localctl.settings import ConditionConfig
from localctl.signals import Interrupt
from localctl.training.data import make_source, open_sources
from localctl.training.encoded import EncodedSource

SCENES = DataConfig(count=20)
GROUP = 16  # rows that the VAE sees at a time at this size


@pytest.fixture(scope="module")
def scenes(sd_folder, tmp_path_factory) -> Path:
    """The encodings of 20 scenes; not to be written to."""
    folder = tmp_path_factory.mktemp("scenes") / "encodings"
    cache(cache_settings(sd_folder, folder, SCENES))
    return folder


@pytest.fixture
def photos(tmp_path) -> DataConfig:
    """Six noisy images with masks, of which one caption occurs twice."""
    root = write_imagefolder(tmp_path / "photos", sizes=[(40, 56), (64, 64)])
    for number, path in enumerate(sorted((root / "images").iterdir())):
        size = Image.open(path).size[::-1]
        noise = np.random.default_rng(number).integers(256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return DataConfig(name="imagefolder", path=str(root), resolution=64, validation_share=0)


def opened(settings) -> tuple:
    """What a training opens before its base is loaded."""
    return open_sources(settings, Accelerator(cpu=True), Path(settings.output_dir))


def edit_captions(data: DataConfig, change) -> None:
    path = Path(data.path) / "metadata.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(number, line)) + "\n" for number, line in enumerate(lines)))


def trained(base: Path, folder: Path, data: DataConfig, encodings: Path | None, **changes) -> list:
    settings = tiny_settings(base, folder, data=data_with(data, encodings), **{"max_train_steps": 4} | changes)
    silent_run(settings).train()
    return loss_log(folder)


def refused(base: Path, tmp_path: Path, data: DataConfig, encodings: Path, message: str, **changes) -> None:
    with pytest.raises(ValueError, match=message):
        opened(tiny_settings(base, tmp_path / "refused", data=data_with(data, encodings), **changes))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_losses_are_those_of_encoding_while_training(request, kind, tmp_path):
    base = request.getfixturevalue(f"{kind}_folder")
    cache(cache_settings(base, tmp_path / "encodings", SCENES))
    options = {"proportion_empty_prompts": 0.4}  # the cached empty caption takes part
    live = trained(base, tmp_path / "live", SCENES, None, **options)
    cached = trained(base, tmp_path / "cached", SCENES, tmp_path / "encodings", **options)
    for before, after in zip(live, cached, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)
        assert after["local"] == pytest.approx(before["local"], abs=1e-5)


def test_encoders_are_not_loaded_but_recorded(sd_folder, scenes, tmp_path):
    settings = {"checkpointing_steps": 2, "data": SCENES}
    live = silent_run(tiny_settings(sd_folder, tmp_path / "live", **settings))
    run = silent_run(tiny_settings(sd_folder, tmp_path / "cached", **settings | {"data": data_with(SCENES, scenes)}))
    pipe = run.state.models.pipe
    assert all(p.is_meta for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())
    assert not any(p.is_meta for p in pipe.unet.parameters())
    assert run.state.info["base"] == live.state.info["base"]  # so a checkpoint of either continues in the other


def test_a_run_continues_with_encodings_where_it_began_without(sd_folder, scenes, tmp_path):
    whole = trained(sd_folder, tmp_path / "whole", SCENES, None)
    options = {"checkpointing_steps": 2}
    silent_run(tiny_settings(sd_folder, tmp_path / "run", data=SCENES, **options)).train(lambda step: step == 2)
    more = trained(sd_folder, tmp_path / "run", SCENES, scenes, resume_from_checkpoint="latest", **options)
    assert [row["loss"] for row in more] == pytest.approx([row["loss"] for row in whole], abs=1e-5)


def test_validation_loads_the_encoders(sd_folder, scenes, tmp_path):
    run = silent_run(tiny_settings(sd_folder, tmp_path, data=data_with(SCENES, scenes), validation_steps=2))
    assert not any(p.is_meta for p in run.state.models.vae.parameters())


def test_other_training_settings_hit(sd_folder, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "encodings")
    before = contents(tmp_path / "encodings")
    changes = {"learning_rate": 1e-5, "output_dir": str(tmp_path / "other"), "train_batch_size": 2}
    result = cache(cache_settings(sd_folder, tmp_path / "encodings", SCENES, **changes))
    assert result.encoded == 0 and result.rows == {"images": 20, "captions": 21}
    assert contents(tmp_path / "encodings") == before


def test_another_vae_misses_for_images_and_is_named(sd_folder, scenes, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(sd_folder, base)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    message = r"encodings of images .* do not fit this training: VAE \(\w{12} in the cache, \w{12} here\); run"
    refused(base, tmp_path, SCENES, scenes, message)
    shutil.copytree(scenes, tmp_path / "encodings")
    result = cache(cache_settings(base, tmp_path / "encodings", SCENES))
    assert result.encoded == 20  # images, not captions
    data = data_with(SCENES, tmp_path / "encodings")
    opened(tiny_settings(sd_folder, tmp_path, data=data))  # the old ones stay


def test_another_precision_is_named(sd_folder, scenes, tmp_path):
    message = r"precision \(float32 in the cache, bfloat16 here\); run `localctl cache`"
    refused(sd_folder, tmp_path, SCENES, scenes, message, mixed_precision="bf16")


def test_nothing_encoded_is_said(sd_folder, tmp_path):
    refused(sd_folder, tmp_path, SCENES, tmp_path / "empty", r"no encodings of images in .*empty; run `localctl cache`")


def test_more_rows_than_encoded_are_counted_and_named(sd_folder, scenes, tmp_path):
    message = r"3 of 23 images \('basic-train-20', 'basic-train-21', 'basic-train-22'\) are not in the encodings"
    refused(sd_folder, tmp_path, DataConfig(count=23), scenes, message)


def test_crops_captions_and_files_miss_each_on_its_own(sd_folder, photos, tmp_path):
    encodings = tmp_path / "encodings"
    assert cache(cache_settings(sd_folder, encodings, photos)).encoded == 6 + 7
    crop = DataConfig(**vars(photos) | {"center_crop": False})
    refused(sd_folder, tmp_path, crop, encodings, r"crop \(center in the cache, random here\), seed")
    edit_captions(photos, lambda number, line: line | {"text": "another one"} if number == 2 else line)
    refused(sd_folder, tmp_path, photos, encodings, r"1 of 7 captions \('another one'\) is not in the encodings")
    assert cache(cache_settings(sd_folder, encodings, photos)).encoded == 1
    shutil.copy(Path(photos.path) / "images/000.png", Path(photos.path) / "images/002.png")
    refused(sd_folder, tmp_path, photos, encodings, r"1 of 6 images \('images/002.png'\) is other than when")
    assert cache(cache_settings(sd_folder, encodings, photos)).encoded == 1
    opened(tiny_settings(sd_folder, tmp_path, data=data_with(photos, encodings)))


def test_a_flipped_bit_is_counted_in_training_and_redone(sd_folder, scenes, tmp_path):
    encodings = tmp_path / "encodings"
    shutil.copytree(scenes, encodings)
    before = contents(encodings)
    [shard] = encodings.glob("images/*/*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    data = DataConfig(**vars(data_with(SCENES, encodings)) | {"max_bad_fraction": 1.0})
    settings = tiny_settings(sd_folder, tmp_path / "run", data=data)
    source, _, _ = opened(settings)
    bad = [index for index in range(20) if not _usable(source, index)]
    assert len(bad) == 1
    silent_run(settings).train()
    assert "encoding damaged" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    assert cache(cache_settings(sd_folder, encodings, SCENES)).encoded == 20  # of the whole file
    assert contents(encodings) == before


def _usable(source: EncodedSource, index: int) -> bool:
    try:
        source.visit(SampleRef(index, 0), 0)
    except ValueError as error:
        assert "have changed" in str(error) and "localctl cache" in str(error)
        return False
    return True


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(sd_folder, scenes, tmp_path, monkeypatch, caplog):
    encodings = tmp_path / "encodings"

    def one_block(finished, bar, interrupt) -> None:
        next(finished)
        interrupt.ask_to_stop()

    with monkeypatch.context() as patch:
        patch.setattr(run, "_drain", one_block)
        result = cache(cache_settings(sd_folder, encodings, SCENES))
    assert result.signal and not list(encodings.glob("*/*/manifest.json"))
    [parts] = encodings.glob("images/*/.parts")
    [whole] = parts.iterdir()
    (parts / f"{'0' * 32}.parquet").write_bytes(whole.read_bytes()[:500])  # half written, as by a full disk
    (parts / f"{'1' * 32}.17.tmp").write_bytes(whole.read_bytes())
    with caplog.at_level("INFO", "localctl"):
        assert not cache(cache_settings(sd_folder, encodings, SCENES)).signal
    assert f"{GROUP} of 20 were encoded before" in caplog.text
    assert contents(encodings) == contents(scenes)


def test_bad_rows_are_counted_named_and_redone(sd_folder, photos, tmp_path, caplog):
    encodings, broken = tmp_path / "encodings", Path(photos.path) / "images/003.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:200])
    with caplog.at_level("INFO", "localctl"):
        result = cache(cache_settings(sd_folder, encodings, photos))
    assert [problem.key for problem in result.problems] == ["images/003.png"] and result.rows["images"] == 5
    assert "1 cannot be encoded (1 image damaged): images/003.png" in caplog.text
    trained(sd_folder, tmp_path / "run", photos, encodings, max_train_steps=2)
    assert "images/003.png" in (tmp_path / "run" / "quarantine.jsonl").read_text()
    broken.write_bytes(good)
    result = cache(cache_settings(sd_folder, encodings, photos))
    assert result.encoded == 1 and not result.problems and result.rows["images"] == 6


def test_variants_are_the_first_epochs_again_and_again(sd_folder, photos, tmp_path):
    data = DataConfig(**vars(photos) | {"center_crop": False, "random_flip": True})
    edit_captions(photos, lambda number, line: line | {"text": [f"{number} a", f"{number} b", f"{number} c"]})
    encodings = tmp_path / "encodings"
    assert cache(cache_settings(sd_folder, encodings, data, num_variants=2)).rows["images"] == 12
    settings = tiny_settings(sd_folder, tmp_path, data=data_with(data, encodings))
    source, _, _ = opened(settings)
    live = make_source(settings, "train")
    views = set()
    for index in range(6):
        for epoch in range(4):
            example, same = source.visit(SampleRef(index, epoch), 0), live.visit(SampleRef(index, epoch % 2), 0)
            assert (example.view, example.caption) == (same.view, same.caption)
            views.add((index, example.view))
            if epoch >= 2:
                assert torch.equal(example.moments, source.visit(SampleRef(index, epoch - 2), 0).moments)
    assert len(views) > 6  # some images look different in both
    run = silent_run(settings)
    assert run.state.info["data"]["variants"] == 2


@pytest.mark.parametrize("kind", ["canny", "depth"])
def test_with_conditions_no_image_is_opened(sd_folder, photos, tmp_path, kind):
    encodings, condition = tmp_path / "encodings", ConditionConfig(kind=kind)
    if kind == "depth":
        photos = DataConfig(**vars(photos) | {"conditioning_image_column": "conditioning_image"})
    cache(cache_settings(sd_folder, encodings, photos, cache_conditions=True, condition=condition))
    settings = tiny_settings(sd_folder, tmp_path, data=data_with(photos, encodings), condition=condition)
    source, _, [size] = opened(settings)
    live = [make_source(settings, "train")[index] for index in range(6)]
    shutil.rmtree(Path(photos.path) / "images")
    for index, same in enumerate(live):
        example = source.visit(SampleRef(index, 0), 0)
        assert torch.equal(example.condition, same.condition) and torch.equal(example.mask, same.mask)
        assert (example.key, example.caption, example.original) == (same.key, same.caption, same.original)
        assert example.pixels.shape[-2:] == size


def test_the_estimate_counts_bytes_and_names_the_disk(sd_folder, tmp_path):
    text = report(cache_settings(sd_folder, tmp_path / "encodings", SCENES, dry_run=True))
    assert f"{'images':<11} {20:>9,} rows x {2 * 4 * 16 * 16 * 4 / 1e3:8.1f} kB" in text
    assert f"{'captions':<11} {21:>9,} rows x {77 * 16 * 4 / 1e3:8.1f} kB" in text
    assert "are free" in text and "with" in text and not (tmp_path / "encodings").exists()


def test_mistakes_are_said_before_work(sd_folder, tmp_path):
    with pytest.raises(ValueError, match="need a folder; pass --encodings_dir FOLDER"):
        cache(CacheSettings(num_workers=0))
    with pytest.raises(ValueError, match="embedded scenes compute their conditions"):
        CacheSettings(cache_conditions=True)


def test_a_full_disk_is_named_and_what_is_finished_stays(sd_folder, scenes, tmp_path, monkeypatch):
    encodings, write = tmp_path / "encodings", workers.pq.write_table
    full = iter([False, True])

    def until_full(*arguments, **options) -> None:
        if next(full):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(workers.pq, "write_table", until_full)
        with pytest.raises(OSError, match=r"\.parquet could not be written: No space left on device"):
            cache(cache_settings(sd_folder, encodings, SCENES))
    assert cache(cache_settings(sd_folder, encodings, SCENES)).rows == {"images": 20, "captions": 21}
    assert contents(encodings) == contents(scenes)


@pytest.mark.slow
def test_an_actor_of_ray_encodes_the_same_bytes(sd_folder, tmp_path, ray_here):
    """Captions, which need the fewest processes; slow tests have more of them."""
    items = {caption_id(text): (text,) for text in ("", *(f"caption {number}" for number in range(50)))}
    found = []
    for count in (0, 1):
        parts = tmp_path / f"{count}" / ".parts"
        parts.mkdir(parents=True)
        settings = cache_settings(sd_folder, tmp_path / "encodings", SCENES)
        run_workers(Work(settings, "captions", "no", parts), items, count, Interrupt())
        rows = [row for path in parts.iterdir() for row in rows_of(parquet.read_table(path))]
        assert len(rows) == len(items)
        found.append({row.id: row.payload for row in rows})
    assert found[0] == found[1] and found[0].keys() == items.keys()


@pytest.mark.slow
def test_two_actors_of_ray_write_the_same_files(sd_folder, scenes, tmp_path, ray_here):
    result = cache(cache_settings(sd_folder, tmp_path / "encodings", SCENES, num_workers=2))
    assert result.encoded == 41
    assert contents(tmp_path / "encodings") == contents(scenes)


@pytest.mark.slow
def test_the_embedded_base_learns_the_same_from_encodings(tmp_path):
    """24 scenes, with precision of float32: the losses of 8 steps within 1e-5."""
    data, base = DataConfig(count=24), Path("micro")
    cache(cache_settings(base, tmp_path / "encodings", data))
    live = trained(base, tmp_path / "live", data, None, max_train_steps=8)
    cached = trained(base, tmp_path / "cached", data, tmp_path / "encodings", max_train_steps=8)
    assert [row["loss"] for row in cached] == pytest.approx([row["loss"] for row in live], abs=1e-5)
