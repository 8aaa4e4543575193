"""Jobs of the tab Place make images with previews on the way, and what they leave generates the same image again."""

from __future__ import annotations

import io
import shlex
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
from PIL import Image
from test_place_form import FIELDS

from localctl.cli.sample import main as sample
from localctl.jobs.embedded import read_embedded
from localctl.studio.config import StudioConfig
from localctl.studio.jobs_queue import Stopped
from localctl.studio.leaving import bundle_of
from localctl.studio.place_actions import PlaceHandlers
from localctl.studio.place_form import read_form, read_sweep, settings_for
from localctl.studio.place_jobs import Note, Shown, Step, run_job
from localctl.studio.studio import Studio

SCENE: dict[str, Any] = {
    "width": 128,
    "height": 128,
    "regions": [
        {"id": "r1", "color": 0, "phrase": "a red circle", "box": [0.05, 0.2, 0.45, 0.7]},
        {"id": "r2", "color": 1, "phrase": "a blue star", "box": [0.55, 0.3, 0.95, 0.8]},
    ],
}
SHORT = {**FIELDS, "prompt": "a red circle and a blue star", "scene": SCENE, "steps": 2, "images": 1}
SMALL = {**SCENE, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    made = Studio(StudioConfig())
    yield made
    made.close()


def run(studio: Studio, folder: Path, /, heat: bool = False, compare: bool = False, **changes: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    form = read_form({**SHORT, **changes}, studio.config)
    reports: list[Any] = []
    made = settings_for(form, folder, studio.config, compare=compare)
    run_job(studio, made, folder, reports.append, lambda: None, heat)
    return reports


def images(reports: list[Any], kind: str = "image") -> list[Path]:
    return [item.path for item in reports if isinstance(item, Shown) and item.kind == kind]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_job_shows_previews_and_an_image_that_says_what_is_in_it(studio: Studio, tmp_path: Path) -> None:
    reports = run(studio, tmp_path)
    steps = [item for item in reports if isinstance(item, Step)]
    assert [step.text for step in steps] == ["Step 1 of 2", "Step 2 of 2"] and steps[-1].share == 1
    assert all(len(step.previews) == 1 for step in steps)
    (shown,) = [item for item in reports if isinstance(item, Shown)]
    assert shown.caption == "seed 3" and "red circle" in shown.lines[0] and "blue star" in shown.lines[0]
    assert Image.open(shown.path).size == (128, 128)


def test_the_image_alone_repeats_itself_on_the_command_line(studio: Studio, tmp_path: Path) -> None:
    (path,) = images(run(studio, tmp_path / "page"))
    record = read_embedded(path)
    assert record["options"]["control"] == ["bias"] and str(tmp_path) not in str(record)
    assert sample(["--from_json", str(path), "--output_dir", str(tmp_path / "again")]) == 0
    assert np.array_equal(pixels(tmp_path / "again" / path.name), pixels(path))


def test_what_is_taken_away_repeats_an_image_whose_photo_is_too_large_for_its_record(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    asked = {"photo": str(tmp_path / "photo.png"), "photo_use": "Image to image", "scene": SMALL}
    (path,) = images(run(studio, tmp_path / "page", **asked))
    assert "init_image" in read_embedded(path)["needs"]
    made = bundle_of(path, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(made.bundle) as archive:
        archive.extractall()
        assert "--from_json" not in archive.read("command.txt").decode()
    assert sample([*shlex.split(made.command)[2:], "--output_dir", "again"]) == 0
    assert np.array_equal(pixels(Path("again") / path.name), pixels(path))


def test_the_models_stay_in_memory_for_the_next_job(studio: Studio, tmp_path: Path) -> None:
    run(studio, tmp_path / "one", scene=SMALL)
    pipe = studio.models.pipe
    reports = run(studio, tmp_path / "two", scene=SMALL, seed=4)
    assert studio.models.pipe is pipe
    assert not any(isinstance(item, Note) and "Loading" in item.text for item in reports)


def test_a_cancelled_job_leaves_no_trace_in_the_next(studio: Studio, tmp_path: Path) -> None:
    (before,) = images(run(studio, tmp_path / "before", scene=SMALL))

    def cancel() -> None:
        if reports:
            raise Stopped("Cancelled.")

    reports: list[Any] = []
    form = read_form({**SHORT, "scene": SMALL}, studio.config)
    (tmp_path / "stopped").mkdir()
    made = settings_for(form, tmp_path / "stopped", studio.config)
    with pytest.raises(Stopped):
        run_job(studio, made, tmp_path / "stopped", lambda item: reports.append(item), cancel, False)
    assert len(reports) == 1
    (after,) = images(run(studio, tmp_path / "after", scene=SMALL))
    assert np.array_equal(pixels(before), pixels(after))


def test_heat_maps_come_beside_the_image_and_do_not_change_it(studio: Studio, tmp_path: Path) -> None:
    (plain,) = images(run(studio, tmp_path / "plain", scene=SMALL))
    reports = run(studio, tmp_path / "heat", heat=True, scene=SMALL)
    assert np.array_equal(pixels(plain), pixels(images(reports)[0]))
    assert [item.caption.rsplit(" ", 3)[0] for item in reports if isinstance(item, Shown) and item.kind == "heat"] == [
        "heat of a red circle",
        "heat of a blue star",
    ]


def test_all_methods_are_compared_side_by_side(studio: Studio, tmp_path: Path) -> None:
    reports = run(studio, tmp_path, compare=True, steps=1, scene=SMALL)
    assert [path.stem.split("_")[-1] for path in images(reports)] == [
        "none",
        "bias",
        "dense",
        "guidance",
        "spacetime",
        "bias+guidance",
    ]
    assert [path.name for path in images(reports, "sheet")] == ["compare.png"]


def test_a_sweep_is_a_grid(studio: Studio, tmp_path: Path) -> None:
    fields = {**SHORT, "scene": SMALL, "steps": 1, "sweep_columns": "0, 2", "sweep_row": "none"}
    form = read_form(fields, studio.config)
    reports: list[Any] = []
    made = settings_for(form, tmp_path, studio.config, sweep=read_sweep(fields, form))
    run_job(studio, made, tmp_path, reports.append, lambda: None, False)
    assert len(images(reports)) == 2 and len(images(reports, "sheet")) == 1


def test_a_photo_is_kept_outside_the_regions_that_are_repainted(studio: Studio, tmp_path: Path) -> None:
    photo = np.full((128, 128, 3), 128, np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    changes: dict[str, Any] = {
        "photo": str(tmp_path / "photo.png"),
        "photo_use": "Repaint the regions",
        "photo_strength": 1.0,
    }
    (path,) = images(run(studio, tmp_path / "job", **changes))
    made = pixels(path).astype(int)
    assert np.abs(made[:20] - 128).max() == 0  # above both regions
    assert np.abs(made[40:80, 10:50] - 128).mean() > 5


def test_a_second_pass_makes_a_larger_image(studio: Studio, tmp_path: Path) -> None:
    (path,) = images(run(studio, tmp_path, scene=SMALL, upscale=1.5, upscale_strength=0.5))
    assert Image.open(path).size == (96, 96)


def told(studio: Studio, **changes: Any) -> list[tuple[Any, Any]]:
    """Return what the handler of the button Generate yields for a page with these fields."""
    fields = {**SHORT, "scene": SMALL, **changes}
    request: Any = SimpleNamespace(session_hash="tab")
    return list(PlaceHandlers(studio, list(fields)).generate("images")(request, *fields.values()))


def test_the_button_shows_the_steps_then_the_image_and_says_how_long_it_took(studio: Studio) -> None:
    shown = told(studio)
    assert any("Step 1 of 2" in str(progress) and "data:image/webp" in str(progress) for progress, _ in shown)
    progress, gallery = shown[-1]
    assert "1 image in" in progress and "red circle" in progress
    path, caption = gallery[0]
    assert Path(path).is_file() and caption == "seed 3"
    assert studio.sessions.of(SimpleNamespace(session_hash="other")).results == {}


def test_a_mistake_is_one_sentence_and_the_next_job_works(studio: Studio) -> None:
    scene = {**SCENE, "regions": [{**SCENE["regions"][0], "phrase": "a green cow"}]}
    (progress, _), = told(studio, scene=scene)  # fmt: skip
    assert "job-failed" in progress and "not in the prompt" in progress
    assert "1 image in" in told(studio)[-1][0]


def test_a_predicted_layout_and_a_colour_map_leave_the_prompt_to_who_types_it(studio: Studio) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), (200, 30, 30), np.uint8)).save(file, "png")
    request: Any = SimpleNamespace(session_hash="tab")
    for values in (
        PlaceHandlers(studio).predict(request, "a red circle left of a blue star", SCENE, 0),
        PlaceHandlers(studio).load_colors(request, file.getvalue(), "a red circle", SCENE),
    ):
        prompt, scene, progress = values
        assert prompt == gr.skip() and scene["regions"] and "job-failed" not in progress
