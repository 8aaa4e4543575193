"""Addons from the command line: each acts where it is meant, and the record repeats the run bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from addon_files import random_controlnet, save_ip_adapter, save_lora, save_word
from conftest import CHANNELS
from PIL import Image
from pipeline_copies import Copies
from sample_helpers import PLAIN, QUICK, assert_same, pixels

from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.layout import Layout, Region
from localctl.layout_io import save_layout

TWO = Layout("a cat, dogs", 64, 64, (Region("a cat", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))


def sampled(name: str, *flags: str, base: list[str] = PLAIN) -> dict[str, np.ndarray]:
    assert sample.main([*base, *flags, "--output_dir", name]) == 0
    return pixels(name)


def repeated(name: str, record: str = "sample.json") -> dict[str, np.ndarray]:
    """Repeat a run from its record alone, or from an image with one, after its inputs are gone."""
    moved = f"{name}_moved"
    shutil.move(name, moved)
    assert sample.main(["--from_json", f"{moved}/{record}", "--output_dir", f"{name}_again"]) == 0
    return pixels(f"{name}_again")


def assert_close(first: np.ndarray, second: np.ndarray) -> None:
    """Equal but for the rounding of another batch size."""
    assert np.abs(first.astype(int) - second).max() <= 2


def differ(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(first[name], second[name]) for name in first)


@pytest.fixture
def inputs(base_here: Path, sd_pipe: Any) -> Path:
    """Images, masks and layouts in the working folder."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save("photo.png")
    Image.new("RGB", (30, 20), "red").save("red.png")
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    Image.fromarray(left).save("left.png")
    Image.new("L", (64, 64)).save("empty.png")
    save_layout(TWO, "two.json")
    return base_here


def test_controlnets_with_masks_are_summed_and_repeated(inputs: Path, sd_pipe: Any) -> None:
    for seed in (0, 1):
        random_controlnet(sd_pipe, seed).save_pretrained(f"net{seed}")
    photo = ["--controlnet_image", "photo.png", "--controlnet_condition", "canny", "--controlnet_scale", "5"]
    one = sampled("one", "--controlnet", "net0", *photo)
    masked = ["--controlnet_mask", "left.png", "--controlnet_end", "0.9"]
    two = sampled("two", "--controlnet", "net0", "net1", *photo, *masked)
    guess = sampled("guess", "--controlnet", "net0", *photo, "--guess_mode")
    assert differ(one, two) and differ(one, guess)
    for name in ("photo.png", "left.png"):
        Path(name).unlink()
    assert_same(two, repeated("two"))
    record = json.loads(Path("two_moved/sample.json").read_text())["options"]
    assert record["controlnet"] == [str(inputs / "net0"), str(inputs / "net1")]
    assert record["controlnet_image"] == ["inputs/controlnet_image_0.png"]


def test_images_in_regions_are_repeated(inputs: Path, sd_pipe: Any) -> None:
    save_ip_adapter(Path("ip"), sd_pipe)
    scene = ["--layout", "two.json", "--base", "base", *QUICK]
    flags = ["--ip_adapter", "ip", "--ip_adapter_image", "red.png", "photo.png"]
    regions = ["--ip_adapter_mask", "region:a cat", "left.png", "--ip_adapter_scale", "1", "0.4"]
    found = sampled("found", *flags, *regions, base=scene)
    same = sampled("same", *flags, "--ip_adapter_mask", "left.png", "left.png", *regions[3:], base=scene)
    assert_same(found, same)  # the region is the left half
    Path("left.png").unlink()
    assert_same(found, repeated("found"))
    assert json.loads(Path("found_moved/sample.json").read_text())["options"]["ip_adapter_mask"] == [
        "region:a cat",
        "inputs/ip_adapter_mask_1.png",
    ]


def test_each_prompt_has_its_own_loras_whatever_the_batch(inputs: Path, sd_pipe: Any) -> None:
    for seed, name in enumerate(("style", "red")):
        save_lora(Path(f"{name}.safetensors"), sd_pipe, seed, "unet", "text_encoder", size=0.3)
    flags = ["--lora", "style.safetensors", "r=red.safetensors", "--lora_scale", "0.5", "0.8", "--seeds", "1", "2"]
    base = ["--prompt", "a b", "c d", "a b", "--base", "base", *QUICK]
    uses = ["--lora_per_prompt", "style", "none", "r:0.3+style"]
    found = sampled("found", *flags, *uses, base=base)
    both = sampled("both", *flags[:3], "--lora_scale", "0.5", "0.3", "--seeds", "1", "2")
    none = sampled("none", "--seeds", "1", "2", base=["--prompt", "c d", *PLAIN[2:]])
    for seed in (1, 2):
        style, other = (found[f"{index:02d}_seed{seed}.png"] for index in (0, 2))
        assert_close(found[f"01_seed{seed}.png"], none[f"00_seed{seed}.png"])
        assert_close(other, both[f"00_seed{seed}.png"])
        assert np.abs(style.astype(int) - other).max() > 8
    assert_same(found, repeated("found"))


def test_a_learned_word_is_a_phrase_and_adds_to_other_addons(inputs: Path, sd_pipe: Any) -> None:
    save_word(Path("toy.safetensors"), 16, vectors=2)
    save_lora(Path("style.safetensors"), sd_pipe, 1, size=0.3)
    random_controlnet(sd_pipe).save_pretrained("net")
    save_ip_adapter(Path("ip"), sd_pipe)
    scene = Layout("a <toy>, dogs", 64, 64, (Region("<toy>", (0, 0, 0.5, 1)), Region("dogs", (0.5, 0, 1, 1))))
    save_layout(scene, "toy.json")
    base = ["--layout", "toy.json", "--base", "base", *QUICK]
    word, lora = ["--textual_inversion", "toy.safetensors"], ["--lora", "style.safetensors"]
    net = ["--controlnet", "net", "--controlnet_condition_image", "photo.png", "--controlnet_mask", "region:dogs"]
    image = ["--ip_adapter", "ip", "--ip_adapter_image", "red.png"]
    start = ["--init_image", "photo.png", "--strength", "0.9", "--upscale", "2"]
    first = sampled("first", *word, *start, base=base)
    found = sampled("found", *word, *lora, *net, *image, *start, base=base)
    assert differ(first, found) and found["00_seed0.png"].shape == (128, 128, 3)
    for name in ("red.png", "photo.png"):
        Path(name).unlink()
    assert_same(found, repeated("found", "00_seed0.png"))


def test_levels_have_weights_of_their_own(inputs: Path, make_adapter: Callable[..., Any]) -> None:
    make_adapter(condition={"kind": "canny", "low": 20, "high": 60}).save_pretrained("adapter")
    adapter = ["--adapter", "adapter", "--image", "photo.png", "--weight", "2"]
    plain, full = sampled("plain"), sampled("full", *adapter)
    assert_same(plain, sampled("off", *adapter, "--level_weights", "0,0,0,0"))
    some = sampled("some", *adapter, "--level_weights", "1,0,0.5,0")
    assert differ(some, full) and differ(some, plain)
    assert_same(some, repeated("some"))


def test_control_takes_part_in_guidance_as_flags_say(inputs: Path, make_adapter: Callable[..., Any]) -> None:
    make_adapter(condition={"kind": "canny", "low": 20, "high": 60}).save_pretrained("adapter")
    adapter = ["--adapter", "adapter", "--image", "photo.png", "--weight", "2", "--guidance_scale", "3"]
    plain = sampled("plain", *adapter)
    assert_same(plain, sampled("one", *adapter, "--unconditional_scale", "1"))
    alone = sampled("alone", *adapter, "--unconditional_scale", "0")
    assert_same(alone, sampled("same", *adapter, "--control_guidance_scale", "3"))
    own = sampled("own", *adapter, "--control_guidance_scale", "6")
    assert differ(plain, alone) and differ(own, alone)
    assert_same(own, repeated("own"))
    assert_same(alone, repeated("alone"))
    # an adapter's own scale is the default, and recorded
    options = {"condition": {"kind": "canny", "low": 20, "high": 60}, "unconditional_scale": 0.0}
    make_adapter(**options).save_pretrained("adapter")
    assert_same(alone, sampled("default", *adapter))
    assert_same(plain, sampled("whole", *adapter, "--unconditional_scale", "1"))
    sampled("unguided", *adapter, "--guidance_scale", "1")
    for name, scale in (("default", 0.0), ("whole", 1.0), ("unguided", 1.0)):
        assert json.loads(Path(name, "sample.json").read_text())["options"]["unconditional_scale"] == [scale]
    assert_same(alone, repeated("default"))


def test_prompts_and_layouts_come_from_a_file(inputs: Path) -> None:
    Path("prompts.txt").write_text("a b\n\n  c d\n", encoding="utf-8")
    base = ["--base", "base", *QUICK]
    found = sampled("found", "--prompts_file", "prompts.txt", base=base)
    assert list(found) == ["00_seed0.png", "01_seed0.png"]
    Path("scenes.jsonl").write_text(
        f"{Path('two.json').read_text()}".replace("\n", " ") + '\n{"prompt": "a b", "height": 64, "width": 64}\n'
    )
    lines = sampled("lines", "--prompts_file", "scenes.jsonl", base=base)
    assert_close(lines["00_seed0.png"], sampled("two", "--layout", "two.json", base=base)["00_seed0.png"])
    Path("scenes.jsonl").unlink()
    assert_same(lines, repeated("lines"))


def test_colours_of_an_image_are_regions(inputs: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (255, 0, 0), (0, 0, 255)
    Image.fromarray(image).save("colours.png")
    base = ["--layout", "colours.png", "--base", "base", *QUICK]
    found = sampled("found", "--color", "red=a cat", "#0000ff=dogs", "--prompt", "a cat, dogs", base=base)
    assert_same(found, sampled("boxes", base=["--layout", "two.json", "--base", "base", *QUICK]))
    Path("colours.png").unlink()
    assert_same(found, repeated("found"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--controlnet_mask left.png", "--controlnet_mask is for a --controlnet, but there is none"),
        ("--guess_mode", "--guess_mode is for a --controlnet"),
        ("--lora_scale 0.5", "--lora_scale is for a --lora"),
        ("--controlnet_end 0.5", "--controlnet_end is for a --controlnet"),
        ("--ip_adapter_scale 0.5", "--ip_adapter_scale is for a --ip_adapter"),
        ("--controlnet net", "A ControlNet follows one image"),
        ("--controlnet net --controlnet_image photo.png", "give --controlnet_condition"),
        (
            "--controlnet net --controlnet_condition_image photo.png --controlnet_scale 1 2",
            "2 values for 1 controlnets",
        ),
        ("--controlnet net --controlnet_condition_image photo.png --controlnet_mask region:cat", "no region 'cat' in"),
        (
            "--controlnet net --controlnet_image red.png --controlnet_condition canny "
            "--controlnet_condition_detector x",
            "leave --controlnet_condition_detector out",
        ),
        (
            "--controlnet gray --controlnet_image photo.png --controlnet_condition palette",
            "takes 1; give the --controlnet_condition",
        ),
        ("--controlnet gray --controlnet_condition_image photo.png", "ControlNet takes 1 .*or use --controlnet_image"),
        ("--controlnet base/unet --controlnet_condition_image photo.png", "There is no ControlNet 'base/unet'"),
        ("--ip_adapter ip", "has no image to follow"),
        ("--ip_adapter_image red.png", "give --ip_adapter"),
        ("--ip_adapter ip ip --ip_adapter_image red.png", "1 values of --ip_adapter_image for 2 IP-Adapters"),
        ("--ip_adapter ip --ip_adapter_image red.png --ip_adapter_mask wide.png", "wide.png is 64x32 pixels but"),
        ("--ip_adapter ip --ip_adapter_image red.png --ip_adapter_mask edge.png", "edge.png is black everywhere in"),
        ("--ip_adapter ip --ip_adapter_image red.png --ip_adapter_start 1", "start < end"),
        ("--lora_per_prompt a", "--lora_per_prompt is for a --lora"),
        ("--lora a.safetensors --lora_per_prompt a a", "2 values for 1 prompts"),
        ("--lora a.safetensors --lora_per_prompt none", "The LoRA 'a' is used by no prompt"),
        ("--lora a.safetensors --lora_scale nan", "must be finite"),
        ("--lora nowhere.safetensors", "There is no LoRA 'nowhere.safetensors'"),
        ("--lora a.safetensors --base sdxl", "text of width 16 but this base has 2048"),
        ("--textual_inversion toy.safetensors", "'<toy>' is in none of the prompts"),
        ("--color red=a", "--color needs a layout"),
        ("--color red=a --layout auto", "--color is for a --layout that is an image"),
        ("--color red=a #f00=b --layout colours.png", "A colour is given twice in --color"),
        ("--prompts_file none.txt", "cannot be read"),
        ("--adapter adapter --image photo.png --level_weights 1,1", "must be 4 finite numbers"),
        ("--adapter adapter --image photo.png --level_weights x", "numbers joined by commas"),
        ("--control_guidance_scale 2", "--control_guidance_scale is for an adapter, but there is none"),
        ("--unconditional_scale 0", "--unconditional_scale is for an adapter, but there is none"),
        ("--adapter adapter --image photo.png --unconditional_scale 0 1", "2 values for 1 adapters"),
        ("--adapter adapter --image photo.png --unconditional_scale 2 --control_guidance_scale 2", "has no meaning"),
        (
            "--adapter adapter --image photo.png --unconditional_scale 0 --guidance_scale 1",
            "does nothing without guidance",
        ),
        ("--adapter adapter --image photo.png --control_guidance_scale nan", "must be a finite number"),
        ("--lora_weight 1", "did you mean --lora_scale"),
        ("--from-file x", "did you mean --prompts_file"),
    ],
)
def test_what_cannot_act_is_refused_before_anything_is_loaded(
    flags: str,
    message: str,
    inputs: Path,
    addon_places: Path,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    prompt = [] if "--prompts_file" in flags else ["--prompt", "a b"]
    base = [] if "--base" in flags else ["--base", "base"]
    for place in addon_places.iterdir():
        Path(place.name).symlink_to(place)
    assert_refused_early([*prompt, *base, *QUICK, *flags.split()], message)


@pytest.fixture(scope="module")
def addon_places(_sd_session: Copies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each addon, which fits the tiny base."""
    folder = tmp_path_factory.mktemp("addons")
    random_controlnet(_sd_session.pipe).save_pretrained(folder / "net")
    random_controlnet(_sd_session.pipe, conditioning_channels=1).save_pretrained(folder / "gray")
    save_ip_adapter(folder / "ip", _sd_session.pipe)
    save_lora(folder / "a.safetensors", _sd_session.pipe)
    save_word(folder / "toy.safetensors", 16)
    Image.new("L", (64, 32), 255).save(folder / "wide.png")
    edge = np.zeros((131, 128), np.uint8)
    edge[0] = 255  # cut off at 64x64
    Image.fromarray(edge).save(folder / "edge.png")
    options = {"in_channels": 1, "channels": list(CHANNELS), "num_res_blocks": 1}
    LocalAdapter(**options, condition={"kind": "canny"}).save_pretrained(folder / "adapter")
    return folder
