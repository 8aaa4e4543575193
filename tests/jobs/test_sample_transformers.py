"""``sample.py`` on transformers: layouts and adapters act, records repeat, and what a base would ignore is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, SIDE, Family, token_adapter
from PIL import Image
from sample_helpers import CANNY, assert_same, pixels, refused_early

from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import parse
from localctl.control.region_bias import RegionBias
from localctl.jobs.prepare import Job, prepare
from localctl.layout import Layout, Region
from localctl.pipelines import BaseConfig, load_pipeline
from localctl.sampling import generate
from localctl.sampling_settings import own_sampling
from localctl.training.settings import TrainSettings

pytest_plugins = ["families"]

PROMPT = "a cat, dogs"
SCENE = {
    "prompt": PROMPT,
    "regions": [{"phrase": "cat", "box": [0, 0, 0.5, 1]}, {"phrase": "dogs", "box": [0.5, 0, 1, 1]}],
}
LAYOUT = Layout(PROMPT, regions=(Region("cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))
SMALL = ["--num_inference_steps", "2", "--resolution", str(SIDE), "--max_sequence_length", "48"]
Folders = Callable[[str], Path]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a scene, a photo and a mask of its left half."""
    monkeypatch.chdir(tmp_path)
    Path("scene.json").write_text(json.dumps(SCENE))
    avoiding = [{**region, "negative_prompt": "dogs"} for region in SCENE["regions"]]
    Path("avoiding.json").write_text(json.dumps({**SCENE, "regions": avoiding}))
    cells = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    Image.fromarray(np.kron(cells, np.ones((SIDE // 4, SIDE // 4, 1))).astype(np.uint8)).save("photo.png")
    Image.fromarray(np.kron([[255, 0]], np.ones((SIDE, SIDE // 2))).astype(np.uint8)).save("mask.png")
    return tmp_path


@pytest.fixture
def folder(family: Family, family_folders: Folders) -> Path:
    return family_folders(family.name)


def job_on(folder: Path, *flags: str) -> Job:
    return prepare(parse(["--base", str(folder), *SMALL, *flags]))


def run_on(folder: Path, output: str, *flags: str) -> dict[str, np.ndarray]:
    assert sample.main(["--base", str(folder), *SMALL, *flags, "--output_dir", output]) == 0
    return pixels(output)


def changed(folder: Path, copy: Path, file: str, change: dict[str, Any]) -> Path:
    """Copy a base, with other values in one of its JSON files."""
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps({**content, **change}))
    return copy


def adapter_for(folder: Path) -> LocalAdapter:
    adapter = token_adapter(load_pipeline(str(folder)))
    adapter.register_to_config(base=str(folder), condition=CANNY)
    adapter.save_pretrained("adapter")
    return adapter


def test_a_layout_acts_as_in_generate_at_any_batch_size(here: Path, family: Family, folder: Path) -> None:
    flags = ["--layout", "scene.json", "--seeds", "1", "2", "--batch_size", "1"]
    found = run_on(folder, "bias", *flags)
    job = job_on(folder, *flags)
    given = {name: getattr(job.options, name) for name in ("guidance_scale", "true_cfg_scale", "max_sequence_length")}
    given["negative_prompt"] = job.options.negative_prompt
    arguments = {name: value for name, value in given.items() if value is not None}
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 2}
    pipe = load_pipeline(str(folder))
    images = generate(pipe, LAYOUT, RegionBias(), [1, 2], batch_size=2, **size, **arguments).images
    plain = generate(pipe, LAYOUT, (), [1, 2], batch_size=2, **size, **arguments).images
    for name, image, other in zip(("00_seed1.png", "00_seed2.png"), images, plain, strict=True):
        assert np.abs(found[name].astype(int) - np.asarray(image)).max() <= 2
        assert np.abs(found[name].astype(int) - np.asarray(other)).max() > 2
    options = json.loads(Path("bias/sample.json").read_text())["options"]
    assert {name: options.get(name) for name in given} == given


def test_an_adapter_acts_and_the_record_repeats_it(here: Path, family: Family, folder: Path) -> None:
    adapter_for(folder)
    flags = ["--prompt", PROMPT, "--adapter", "adapter", "--image", "photo.png", "--mask", "mask.png"]
    found = run_on(folder, "out", *flags)
    assert sample.main(["--from_json", "out/sample.json", "--output_dir", "again"]) == 0
    assert sample.main(["--from_json", "out/00_seed0.png", "--base", str(folder), "--output_dir", "png"]) == 0
    assert_same(pixels("again"), found)
    assert_same(pixels("png"), found)
    idle = run_on(folder, "idle", *flags, "--weight", "0")
    plain = run_on(folder, "plain", "--prompt", PROMPT)
    assert_same(idle, plain)
    assert not np.array_equal(found["00_seed0.png"], plain["00_seed0.png"])


@pytest.mark.slow
@pytest.mark.parametrize("control", ["dense", "guidance", "forward", "spacetime", "bias+guidance"])
def test_each_method_runs(here: Path, family: Family, folder: Path, control: str) -> None:
    assert run_on(folder, "out", "--layout", "scene.json", "--control", control)


@pytest.mark.slow
def test_images_start_from_images_and_grow(here: Path, family: Family, folder: Path) -> None:
    if not family.image_to_image:
        pytest.skip("diffusers has no such pipeline")
    first = run_on(folder, "image", "--layout", "scene.json", "--init_image", "photo.png")
    large = run_on(folder, "large", "--layout", "scene.json", "--upscale", "2")
    assert first["00_seed0.png"].shape == (SIDE, SIDE, 3) and large["00_seed0.png"].shape == (2 * SIDE, 2 * SIDE, 3)


def test_a_second_pass_begins_with_the_latents_of_the_first(here: Path, family_folders: Folders) -> None:
    """Which FLUX's pipeline returns packed, and takes unpacked."""
    folder, flags = family_folders("flux"), ["--prompt", PROMPT, "--upscale", "2"]
    weak, strong = (
        run_on(folder, strength, *flags, "--upscale_strength", strength)["00_seed0.png"] for strength in ("0.5", "1")
    )
    assert weak.shape == (2 * SIDE, 2 * SIDE, 3) and not np.array_equal(weak, strong)


@pytest.mark.parametrize(
    ("name", "guidance", "second", "negative"),
    [
        ("pixart", 4.5, None, None),
        ("sd3", 7.0, None, None),
        ("flux", 3.5, None, None),
        ("flux2", 4.0, None, None),
        ("qwen_image", None, 4.0, " "),
        ("z_image", 5.0, None, None),
    ],
)
def test_guidance_is_the_pipeline_s_and_recorded(
    here: Path, family_folders: Folders, name: str, guidance: float | None, second: float | None, negative: str | None
) -> None:
    job = job_on(family_folders(name), "--prompt", PROMPT)
    options = job.options
    assert (options.guidance_scale, options.true_cfg_scale, options.negative_prompt) == (guidance, second, negative)
    assert options.scheduler is None and job.size == (SIDE, SIDE)


@pytest.mark.parametrize("stated", [None, 2.5])
def test_every_program_generates_with_the_guidance_that_a_base_states(
    here: Path, family_folders: Folders, sd_folder: Path, stated: float | None
) -> None:
    for name in (*FAMILIES, "sd"):
        folder = shutil.copytree(sd_folder if name == "sd" else family_folders(name), here / name)
        if stated is not None:
            (folder / "localctl.json").write_text(json.dumps({"guidance_scale": stated}))
        options = prepare(parse(["--base", str(folder), "--prompt", PROMPT])).options
        scale = options.true_cfg_scale if name == "qwen_image" else options.guidance_scale
        assert scale == stated or stated is None
        settings = TrainSettings(base=BaseConfig(name=str(folder)))
        assert settings.validation.guidance_scale == settings.early_stopping.guidance_scale == scale
        python = own_sampling(str(folder))
        assert (python.true_cfg_scale if name == "qwen_image" else python.guidance_scale) == stated


@pytest.mark.parametrize(
    "text",
    [
        *("[]", "{", '{"guidance_scale": "2"}', '{"guidance_scale": 2, "scheduler": "ddim"}'),
        *(f'{{"guidance_scale": {value}}}' for value in ("true", "-1", "NaN", "1" + "0" * 400)),
    ],
)
def test_what_a_base_states_is_checked(
    here: Path, sd_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(sd_folder, here / "sd")
    (here / "sd" / "localctl.json").write_text(text)
    refused_early(["--base", "sd", "--prompt", PROMPT], "The file sd/localctl.json ", monkeypatch, capsys)


def test_a_size_is_the_base_s_or_a_multiple_of_its_tokens(here: Path, family_folders: Folders) -> None:
    flags = ["--prompt", PROMPT, "--base"]
    assert prepare(parse([*flags, str(family_folders("flux"))])).size == (1024, 1024)
    assert prepare(parse([*flags, str(family_folders("sd3"))])).size == (32, 32)
    assert prepare(parse([*flags, str(family_folders("sd3")), "--height", "48"])).size == (48, 32)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("sd3", "--height 40", "The height 40 is not a multiple of 16, which the base needs; use 32, for example"),
        ("sd3", "--scheduler ddim", "samples by flow matching, which the scheduler ddim is not for; .* euler, heun"),
        ("flux", "--scheduler heun", "the scheduler heun is not for; leave it out, or choose one of euler, lcm"),
        ("sd3", "--scheduler lcm", "FlowMatchLCMScheduler samples noise between the steps that the seeds cannot set"),
        ("sd3", "--layout scene.json --control guidance --scheduler heun", "would lose a control's shift of the lat"),
        ("sd3", "--layout scene.json --control spacetime_optimized", "spacetime_optimized optimises weights through"),
        ("flux", "--clip_skip 1", "A FluxPipeline takes no clip_skip; leave --clip_skip out"),
        ("sd3", "--guidance_rescale 0.5", "A StableDiffusion3Pipeline takes no guidance_rescale"),
        ("sd3", "--true_cfg_scale 2", "A StableDiffusion3Pipeline takes no true_cfg_scale"),
        ("sd3", "--max_sequence_length=-1", "The max sequence length must be at least 0, not -1"),
        ("flux", "--max_sequence_length 513", "is 513, but a FluxPipeline reads at most 512 tokens of a prompt; low"),
        ("flux", "--max_sequence_length 0", "with which the last text encoder of a FluxPipeline reads no prompt; giv"),
        ("sd3", "--max_sequence_length 0", "with which the last text encoder of a StableDiffusion3Pipeline reads no p"),
        ("z_image", "--max_sequence_length 225", "is 225, but a ZImagePipeline reads at most 224 tokens"),
        ("sd3", "--clip_skip 2", "--clip_skip must be a whole number from 0 to 1 with this base, not 2"),
        ("qwen_image", "--guidance_scale 4", "ignores --guidance_scale; give --true_cfg_scale in place of it"),
        ("flux2", "--negative_prompt x", "A Flux2KleinPipeline takes no negative_prompt; leave --negative_prompt out"),
        ("pixart", "--init_image photo.png", "has no image-to-image pipeline beside PixArtSigmaPipeline"),
        ("flux2", "--upscale 2", "has no image-to-image pipeline beside Flux2KleinPipeline"),
        ("qwen_image", "--vae vae", "--vae replaces an AutoencoderKL, and the base has an AutoencoderKLQwenImage"),
        ("flux", "--layout avoiding.json", "of regions do nothing without guidance; give a --true_cfg_scale above 1"),
        ("sd3", "--prompt (cat:1.3)", r"The prompt '\(cat:1.3\)' has weights, which acts on .* not on a SD3 tr"),
        ("sd3", "--negative_prompt (x:1.3)", r"The prompt '\(x:1.3\)' has weights, which acts on Stable Diffusion 1.x"),
        ("sd3", "--prompt_weighting true", "prompt_weighting=True acts on Stable Diffusion 1.x, 2.x and XL only"),
    ],
)  # fmt: skip
def test_what_a_base_cannot_do_is_refused_before_it_is_loaded(
    here: Path,
    family_folders: Folders,
    name: str,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = [] if "--layout" in flags or "--prompt " in flags else ["--prompt", PROMPT]
    refused_early(["--base", str(family_folders(name)), *own, *flags.split()], message, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (
            "flux",
            "--unconditional_scale 0",
            "--unconditional_scale does nothing without guidance; give a --true_cfg_sc",
        ),
        ("flux", "--control_guidance_scale 2", "do not compute negative . g .prompt - negative. from one call"),
        ("pixart", "--control_guidance_scale 2", "do not tell their guidance scale, so no control can have one"),
        ("z_image", "--guidance_scale 0 --unconditional_scale 0", "without guidance; give a --guidance_scale above 0"),
    ],
)
def test_guidance_that_a_base_does_not_have_is_refused_for_an_adapter(
    here: Path,
    family_folders: Folders,
    name: str,
    flags: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = family_folders(name)
    adapter_for(folder)
    given = ["--adapter", "adapter", "--image", "photo.png", "--prompt", PROMPT, *SMALL, *flags.split()]
    refused_early(given, message, monkeypatch, capsys)


def test_an_adapter_of_another_kind_of_base_is_refused(
    here: Path,
    family_folders: Folders,
    make_adapter: Callable[..., LocalAdapter],
    sd_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sd3 = family_folders("sd3")
    make_adapter(condition=CANNY).save_pretrained("full")
    adapter_for(sd3)
    given = ["--image", "photo.png", "--prompt", PROMPT]
    refused_early(
        [*given, "--adapter", "full", "--base", str(sd3)],
        r"takes \(16, 32, 32\) after any of its 4 blocks; the adapter full does not fit",
        monkeypatch,
        capsys,
    )
    refused_early([*given, "--adapter", "adapter", "--base", str(sd_folder)], "U-Net takes .*fit", monkeypatch, capsys)


def test_distilled_bases_ignore_guidance(
    here: Path, family_folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FLUX.2 Klein says so in its index, FLUX.1 schnell in its transformer's config."""
    for name, file, change in (
        ("flux2", "model_index.json", {"is_distilled": True}),
        ("flux", "transformer/config.json", {"guidance_embeds": False}),
    ):
        given = ["--base", str(changed(family_folders(name), here / name, file, change)), "--prompt", PROMPT]
        assert prepare(parse(given)).options.guidance_scale is None
        refused_early([*given, "--guidance_scale", "3"], "ignores --guidance_scale", monkeypatch, capsys)
        (here / name / "localctl.json").write_text('{"guidance_scale": 2.0}')
        refused_early(given, f"The file {here / name}/localctl.json states a guidance scale", monkeypatch, capsys)
        with pytest.raises(ValueError, match="states a guidance scale, which this base ignores"):
            generate(load_pipeline(str(here / name)), PROMPT, num_inference_steps=1)


def test_sd3_without_t5_reads_clip_s_tokens_alone(here: Path, family_folders: Folders) -> None:
    """Of whose number ``max_sequence_length`` says nothing."""
    change = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3")}
    folder = changed(family_folders("sd3"), here / "sd3", "model_index.json", change)
    assert run_on(folder, "out", "--prompt", PROMPT, "--max_sequence_length", "0")


def test_phrases_need_a_base_in_whose_tokens_they_are_located(
    here: Path, family_folders: Folders, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = changed(family_folders("flux2"), here / "dev", "model_index.json", {"_class_name": "Flux2Pipeline"})
    given = ["--base", str(dev), "--layout", "scene.json"]
    refused_early(given, "Phrases cannot be located in the tokens of a Flux2Pipeline", monkeypatch, capsys)


def test_a_note_says_that_a_negative_prompt_does_nothing(here: Path, family_folders: Folders) -> None:
    job = job_on(family_folders("flux"), "--prompt", PROMPT, "--negative_prompt", "x")
    assert job.notes == ["--negative_prompt does nothing with a --true_cfg_scale of 1 or less."]
    guided = job_on(family_folders("flux"), "--prompt", PROMPT, "--true_cfg_scale", "3")
    assert guided.options.negative_prompt == "" and not guided.notes


def test_every_family_is_tried_here() -> None:
    assert set(FAMILIES) == {"pixart", "sd3", "flux", "flux2", "qwen_image", "z_image"}
