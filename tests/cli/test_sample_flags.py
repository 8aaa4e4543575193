"""The flags of ``sample.py``, and its records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sample_helpers import PLAIN, QUICK, assert_same, pixels

import localctl.jobs.generate
import localctl.pipelines
from localctl.adapter import LocalAdapter
from localctl.cli import sample
from localctl.cli.sample import new_parser, parse
from localctl.control.presets import CONTROLS
from localctl.jobs.prepare import prepare
from localctl.layout_predictor.model import WEIGHTS
from localctl.sampling import Sampling, generate


def test_a_prompt_alone_is_plain_text_to_image(base_here: Path) -> None:
    assert sample.main([*PLAIN, "--seeds", "1", "2", "--output_dir", "out"]) == 0
    images = generate(localctl.pipelines.load_pipeline("base"), "a b", (), (1, 2), num_inference_steps=2).images
    expected = {f"00_seed{seed}.png": np.asarray(image) for seed, image in zip((1, 2), images, strict=True)}
    assert_same(pixels("out"), expected)
    assert Image.open("out/sheet.png").width > 2 * 64
    assert sample.main(["--from_json", "out", "--control", "none", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), expected)
    assert sample.main([*PLAIN, "--resolution", "72x64", "--output_dir", "wide"]) == 0
    assert pixels("wide")["00_seed0.png"].shape == (64, 72, 3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "a", "red", "circle"], 'has 3 single words; put one prompt in quotes, --prompt "a red circle"'),
        (["--prompt", "a", "red", "circle,", "blue", "--base", "x"], '--prompt "a red circle, blue"'),
        (["--prompt", "a", "red circle"], 'has 2 parts; put one prompt in quotes, --prompt "a red circle"'),
        (["--prompt", "a cat", "and", "a dog"], "several: --prompt 'a cat' --prompt and ..."),
        (["--prompt", "cat", "dog"], "or repeat the flag for each of several: --prompt cat --prompt dog"),
        (["--prompt=a", "red", "circle"], 'has 3 single words; put one prompt in quotes, --prompt "a red circle"'),
        (["a red circle"], "'a red circle' belongs to no flag; put text in quotes: --prompt \"a red circle\""),
        (["a", "red", "--base", "micro"], '--prompt "a red"'),
        (["--prompt", "a b", "--negative_prompt", "ugly,", "bad"], '--negative_prompt "ugly, bad"'),
        (["--prompt", "a b", "--base", "micro", "more", "words"], '--prompt "more words"'),
        (["--prompt", "a b", "--seed", "3"], "Unrecognized arguments: --seed 3 (did you mean --seeds?); see --help"),
        (["--prompt", "a b", "--steps=3"], "--steps=3 (did you mean --num_inference_steps?)"),
        (["--prompt", "a b", "--model", "x"], "did you mean --base?"),
        (["--prompt", "a b", "--purple"], "Unrecognized arguments: --purple; see --help"),
        (["--prompt", "a b", "--seeds", "1" * 80], "has more than 64 bits"),
        (["--prompt", "a b", "--seeds", "9" * 5000], "invalid int value: '9999"),
        (["--prompt", "a b", "--seeds", str(-(10**300))], "has more than 64 bits"),
        (["--prompt", "a b", "--use_karras_sigmas", "maybe"], "expected true or false, not 'maybe'"),
        (["--height", "64"], "no prompt; give --prompt"),
    ],
)
def test_a_mistake_in_the_flags_is_answered_with_the_right_ones(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        parse(argv)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_several_prompts() -> None:
    for argv, expected in (
        (["--prompt", "a cat", "dogs"], ["a cat", "dogs"]),
        (["--prompt", "cat", "--prompt", "dog"], ["cat", "dog"]),
        (["--prompt", "a red circle"], ["a red circle"]),
        (["--prompt", "cat"], ["cat"]),
        (["--prompt="], [""]),
    ):
        assert parse(argv).prompt == expected


def test_the_help_names_all_controls() -> None:
    text = " ".join(new_parser().format_help().split())
    assert all(name in text for name in CONTROLS)


def test_the_seed_minus_one_is_noted(base_here: Path) -> None:
    assert prepare(parse([*PLAIN, "--seeds", "-1"])).notes == [
        "The seed -1 is a seed like any other, not a random one."
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["a"], "colour": "red"}, "record .* cannot be used: There is no setting 'colour'"),
        ({"prompt": ["a"], "--base": "x"}, "There is no setting '--base'"),
        ({"prompt": [1]}, "record .*: prompt must be text, not 1"),
        ({"prompt": [["a"]]}, "record .*: prompt must be text, not \\['a'\\]"),
        ({"prompt": ["a"], "seeds": ["x"]}, "record .*: seeds must be a whole number, not 'x'"),
        ({"prompt": ["a"], "seeds": [10**300]}, "record .*: seeds must be .* no more than 64 bits, not 1000"),
        ({"prompt": ["a"], "seeds": [{}]}, "record .*: seeds must be a whole number, not {}"),
        ({"prompt": ["a"], "guidance_scale": [7.5]}, "record .*: guidance_scale must be a number, not .7.5."),
        ({"prompt": ["a"], "guidance_scale": "many"}, "record .*: guidance_scale must be a number, not 'many'"),
        ({"prompt": ["a"], "height": True}, "record .*: height must be a whole number, not True"),
        ({"prompt": ["a"], "dtype": "half"}, "record .*: Unknown dtype 'half'; choose one of float32"),
        ({"prompt": ["a"], "base": {"name": "x"}}, "record .*: base must be text, not "),
        ({"prompt": []}, "There is no prompt"),
        ({}, "There is no prompt"),
        ([], "is not a record of sample.py"),
    ],
)
def test_wrong_values_in_a_record_are_refused_in_one_sentence(options: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    path.write_text(json.dumps({"options": options}))
    with pytest.raises(ValueError, match=message) as error:
        parse(["--from_json", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "[" * 100_000, '{"options": ' + '{"a":' * 50_000, "\x00\xff", "{" + "9" * 9000]
)
def test_other_files_than_records_are_refused_in_one_sentence(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a record of sample.py") as error:
        parse(["--from_json", str(path)])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read .no such file"):
        parse(["--from_json", str(tmp_path)])


def test_records_of_all_versions_equal_their_flags(tmp_path: Path) -> None:
    """As the first version wrote them (all flags, single values not in a list, no resolution, weights in prompts are
    text), and as today."""
    first = {
        "prompt": "a b", "adapter": None, "weight": [1.0], "start": [0.0], "end": [1.0], "layout": None,
        "base": "micro", "seeds": [0, -2], "num_inference_steps": 3, "guidance_scale": 2, "height": None,
        "scheduler": None, "batch_size": 4, "dtype": "float32", "device": "auto", "output_dir": "out",
        "from_json": None,
    }  # fmt: skip
    path = tmp_path / "sample.json"
    path.write_text(json.dumps({"localctl": "0.1.0", "options": first, "images": []}))
    read = parse(["--from_json", str(path)])
    flags = ["--prompt", "a b", "--seeds", "0", "-2", "--num_inference_steps", "3", "--guidance_scale", "2"]
    same = parse([*flags, "--base", "micro", "--output_dir", "out"])
    assert replace(read, from_json=None) == replace(same, prompt_weighting=False)
    path.write_text(json.dumps({"options": asdict(same)}))
    assert replace(parse(["--from_json", str(path)]), from_json=None) == same


def test_a_record_may_have_the_weight_of_an_adapter_that_it_has_not(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"  # of a version that took the flag and did nothing with it
    path.write_text(json.dumps({"options": {"prompt": "a b", "weight": [0.5]}}))
    assert parse(["--from_json", str(path)]).weight == [0.5]
    with pytest.raises(ValueError, match="--end is for an adapter, but there is none"):
        parse(["--from_json", str(path), "--end", "0.5"])


def test_values_of_a_record_are_never_flags(base_here: Path) -> None:
    prompts = ["a", "--output_dir", "--seeds=3", "-x"]
    record = {"prompt": prompts, "negative_prompt": "--base", "base": "base", "num_inference_steps": 1, "seeds": [4]}
    Path("sample.json").write_text(json.dumps({"options": record}))
    options = parse(["--from_json", "sample.json", "--output_dir", "out"])
    assert (options.prompt, options.negative_prompt, options.seeds, options.base) == (prompts, "--base", [4], "base")
    assert options.output_dir == "out" and options.batch_size == 4
    assert sample.main(["--from_json", "sample.json", "--output_dir", "out"]) == 0
    assert sorted(pixels("out")) == [f"0{i}_seed4.png" for i in range(4)]


def test_a_flag_replaces_its_alternative_in_a_record(tmp_path: Path) -> None:
    path = tmp_path / "sample.json"
    options = {"prompt": ["a"], "image": ["x.png"], "height": 64, "width": 64, "control": ["bias"], "mask": ["m.png"]}
    path.write_text(json.dumps({"options": options}))
    read = parse(["--from_json", str(path), "--condition_image", "y.png", "--resolution", "96", "--compare", "all"])
    assert (read.image, read.condition_image, read.mask) == (None, ["y.png"], [str(tmp_path / "m.png")])
    assert (read.height, read.width, read.resolution) == (None, None, (96, 96))
    assert (read.control, read.compare) == (None, ["all"])


def test_odd_prompts_are_recorded(base_here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Half a surrogate, as of a terminal in another encoding, becomes a question mark, with a note."""
    prompts = ["a \udce9 b", "tab\tand \u202e", "%s {0} <script>", "a " * 1000]
    flags = [item for prompt in prompts for item in ("--prompt", prompt)]
    assert sample.main([*flags, "--base", "base", "--num_inference_steps", "1", "--output_dir", "out"]) == 0
    assert (
        "--prompt has characters that are not valid Unicode; they are read as question marks" in capsys.readouterr().err
    )
    record = json.loads(Path("out/sample.json").read_text(encoding="utf-8"))
    assert record["options"]["prompt"] == ["a ? b", *prompts[1:]] and len(record["images"]) == 4
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0
    assert_same(pixels("again"), pixels("out"))


def test_the_sampling_flags_act_and_are_repeated(base_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = localctl.pipelines.load_pipeline("base")
    Path("vae").mkdir()
    torch.manual_seed(1)
    for parameter in pipe.vae.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    pipe.vae.save_pretrained("vae")
    steps = ["--num_inference_steps", "4"]
    assert sample.main([*PLAIN, *steps, "--scheduler", "euler", "--output_dir", "plain"]) == 0
    plain = pixels("plain")["00_seed0.png"]
    images = {}
    for name, flags in {
        "karras": ["--use_karras_sigmas"],
        "rescale": ["--guidance_rescale", "0.7"],
        "vae": ["--vae", "vae"],
    }.items():
        assert sample.main([*PLAIN, *steps, "--scheduler", "euler", *flags, "--output_dir", name]) == 0
        images[name] = pixels(name)["00_seed0.png"]
        assert not np.array_equal(images[name], plain), name
        assert sample.main(["--from_json", f"{name}/sample.json", "--output_dir", f"{name}2"]) == 0
        assert_same(pixels(f"{name}2"), pixels(name))
    assert sample.main(["--from_json", "karras", "--use_karras_sigmas", "false", "--output_dir", "off"]) == 0
    assert np.array_equal(pixels("off")["00_seed0.png"], plain)
    pipe = localctl.pipelines.load_pipeline("base")
    localctl.pipelines.set_scheduler(pipe, "euler")
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_rescale": 0.7}
    assert np.array_equal(np.asarray(generate(pipe, "a b", **call).images[0]), images["rescale"])
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_karras_sigmas=True)
    assert np.array_equal(np.asarray(generate(pipe, "a b", num_inference_steps=4).images[0]), images["karras"])


def test_clip_skip_and_the_base_settings_are_passed_on(base_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def load(base: Any, **options: Any) -> Any:
        seen["base"] = base
        return localctl.pipelines.load_pipeline("base")

    def make(*args: Any, sampling: Sampling, **options: Any) -> Any:
        seen["clip_skip"] = sampling.clip_skip
        return generate(*args, sampling=replace(sampling, clip_skip=None), **options)

    monkeypatch.setattr(localctl.jobs.generate, "load_pipeline", load)
    monkeypatch.setattr(localctl.jobs.generate, "generate", make)
    flags = ["--clip_skip", "1", "--variant", "fp16", "--revision", "v2", "--local_files_only", "--dtype", "bfloat16"]
    assert sample.main([*PLAIN, *flags, "--output_dir", "out"]) == 0
    base = seen["base"]
    assert (base.variant, base.revision, base.local_files_only, base.dtype) == ("fp16", "v2", True, "bfloat16")
    assert seen["clip_skip"] == 1
    first = dict(seen)
    assert sample.main(["--from_json", "out", "--output_dir", "again"]) == 0
    assert seen["clip_skip"] == 1 and vars(seen["base"]) == {**vars(first["base"]), "name": str(Path("base").resolve())}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--use_karras_sigmas"],
            "DDIMScheduler has no Karras sigmas; choose a --scheduler of these: deis, dpmpp_2m, .* heun, ",
        ),
        (["--use_karras_sigmas", "--scheduler", "pndm"], "PNDMScheduler has no Karras sigmas"),
        (["--guidance_rescale", "1.5"], "--guidance_rescale must be between 0 and 1, not 1.5"),
        (["--guidance_rescale", "nan"], "between 0 and 1"),
        (["--guidance_rescale", "0.5", "--guidance_scale", "1"], "does nothing without guidance"),
        (["--clip_skip", "-1"], "--clip_skip must be a whole number from 0 to 2 with this base, not -1"),
        (["--clip_skip", "3"], "--clip_skip must be a whole number from 0 to 2 with this base, not 3"),
        (["--vae", "nowhere"], "There is no|VAE 'nowhere' could not be loaded"),
        (["--vae", "./none"], "VAE './none' could not be loaded"),
        (["--vae", "vae.safetensors"], "vae.safetensors is a file; give a diffusers folder"),
        (["--vae", "base/unet"], "is a UNet2DConditionModel; give an AutoencoderKL"),
        (["--vae", "other"], "makes latents of another shape"),
        (["--predictor", "x"], "--predictor needs a layout with regions"),
        (["--layout", "auto", "--predictor", "nowhere"], "no layout predictor in nowhere"),
        (["--layout", "auto", "--layout_predictor", "nowhere"], "no layout predictor in nowhere"),
        (["--layout", "scene.json", "--predictor", "x"], "--predictor is for --layout auto"),
        (["--control", "bias"], "--control needs a layout with regions"),
        (["--layout", "bare.json", "--control", "bias"], "needs a layout with regions, and bare.json has none"),
        (["--layout", "bare.json", "--set", "strength=2"], "--set needs a layout with regions, and bare.json"),
        (["--guidance_scale", "-3"], "guidance scale must be at least 0, not -3.0"),
        (["--control", "none", "bias"], "--control needs a layout with regions"),
        (["--base", "./gone"], "no base './gone'"),
        (["--base", "own/model", "--local_files_only"], "base 'own/model' could not be loaded"),
    ],
)
def test_impossible_settings_are_refused_before_the_base_is_loaded(
    base_here: Path,
    flags: list[str],
    message: str,
    assert_refused_early: Callable[[list[str], str], None],
) -> None:
    Path("vae.safetensors").write_bytes(b"")
    Path("other").mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [1, 2, 3, 4]}
    Path("other/config.json").write_text(json.dumps(config))
    Path("scene.json").write_text(json.dumps({"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 1, 1]}]}))
    Path("bare.json").write_text(json.dumps({"prompt": "a"}))
    own = {"scene.json", "bare.json"} & {*flags}
    argv = [item for item in PLAIN if not own or item not in ("--prompt", "a b")]
    assert_refused_early([*argv, *flags], message)


def test_a_missing_clip_is_refused_before_the_base_is_loaded(
    base_here: Path, assert_refused_early: Callable[[list[str], str], None]
) -> None:
    Path("scene.json").write_text(json.dumps({"prompt": "a", "regions": [{"phrase": "a", "box": [0, 0, 1, 1]}]}))
    basic = ["--layout", "scene.json", "--base", "base", "--control", "spacetime_optimized"]
    assert_refused_early([*basic, "--set", "clip=/none"], "There is no CLIP at /none")
    for name in ("--clip_skip", "--guidance_rescale"):
        assert_refused_early([*basic, name, "1"], f"{name} does not go together with")


def test_another_predictor(base_here: Path) -> None:
    prompt = ["--layout", "auto", "--prompt", "a red circle above a blue star"]
    own, shipped = prepare(parse([*prompt, "--predictor", str(WEIGHTS)])), prepare(parse(prompt))
    assert own.layouts == shipped.layouts and own.layouts[0].regions


def test_an_adapter_works_on_another_base_of_its_shape(
    make_adapter: Callable[..., LocalAdapter], base_here: Path, sd_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = localctl.pipelines.load_pipeline("base")
    pipe.unet.conv_out.weight.add_(0.01)
    pipe.save_pretrained("tuned")
    make_adapter(base=str(sd_folder), condition={"kind": "canny"}).save_pretrained("canny")
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save("edges.png")
    flags = ["--prompt", "a b", "--condition_image", "edges.png", "--adapter", "canny", *QUICK]
    assert sample.main([*flags, "--base", "tuned", "--output_dir", "out"]) == 0
    assert f"adapter canny was trained on {sd_folder} and is used on tuned, which" in capsys.readouterr().err
    assert sample.main([*flags, "--output_dir", "own"]) == 0
    assert "was trained on" not in capsys.readouterr().err
    assert not np.array_equal(pixels("out")["00_seed0.png"], pixels("own")["00_seed0.png"])
