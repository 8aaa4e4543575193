"""Adapters to other programs' files and back: the same features, bit for bit, and nothing runs that a file contains."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from diffusers import T2IAdapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from localctl.adapter import OPTIONS, SHAPE, LocalAdapter
from localctl.adapter_files import find_adapter, list_adapters, load_adapter
from localctl.adapter_weights import as_metadata
from localctl.bridges import bundle_adapters, convert_adapter

# As published: canny (full), colour (light) and canny XL; small ones of the same forms for quick tests.
FULL = {"channels": [320, 640, 1280, 1280], "num_res_blocks": 2}
REAL: dict[str, dict[str, Any]] = {
    "full_adapter": {**FULL, "in_channels": 1, "downscale_factor": 8},
    "light_adapter": {"in_channels": 3, "channels": [320, 640, 1280], "num_res_blocks": 4, "downscale_factor": 8},
    "full_adapter_xl": {**FULL, "in_channels": 3, "downscale_factor": 16},
}
SMALL = {
    kind: {**options, "channels": [width // 40 for width in options["channels"]]} for kind, options in REAL.items()
}
KINDS = list(REAL)
Model = TypeVar("Model", bound=torch.nn.Module)


def make(kind: str, options: dict[str, dict[str, Any]] = SMALL, **local: Any) -> LocalAdapter:
    torch.manual_seed(3)
    return LocalAdapter(**options[kind], adapter_type=kind, **local).eval().requires_grad_(False)


def published_features(state: dict[str, Tensor], x: Tensor, factor: int, down: tuple[int, ...]) -> list[Tensor]:
    """What the authors' ``Adapter``, ``Adapter_light`` and ``Adapter_XL`` compute from their own names of weights, read
    from adapters.py: a second opinion on the names. ``down``: the levels that begin by halving."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def block(name: str, x: Tensor) -> Tensor:
        return conv(f"{name}.block2", F.relu(conv(f"{name}.block1", x))) + x

    x, features = F.pixel_unshuffle(x, factor), []
    light = "conv_in.weight" not in state
    x = x if light else conv("conv_in", x)
    for level in range(4):
        x = F.avg_pool2d(x, 2) if level in down else x
        if light:
            x = conv(f"body.{level}.in_conv", x)
            for inner in range(4):
                x = block(f"body.{level}.body.{inner}", x)
            x = conv(f"body.{level}.out_conv", x)
        else:
            first = 2 * level
            x = conv(f"body.{first}.in_conv", x) if f"body.{first}.in_conv.weight" in state else x
            x = block(f"body.{first + 1}", block(f"body.{first}", x))
        features.append(x)
    return features


def aligned(module: Model) -> Model:
    """Copy the weights: read from a file they may lie at any byte, where sums of convolutions round differently."""
    return copy.deepcopy(module)


def check_round_trip(kind: str, options: dict[str, dict[str, Any]], folder: Path) -> None:
    """diffusers -> the authors' names, by hand and by our own reading -> diffusers: the same features."""
    adapter = make(kind, options, mask_resize="cover", condition={"kind": "canny"} if kind == "full_adapter" else None)
    adapter.save_pretrained(folder / "local")
    factor, channels = adapter.config["downscale_factor"], adapter.config["in_channels"]
    x = torch.rand(1, channels, 4 * factor * (2 if kind != "full_adapter_xl" else 1), 8 * factor)
    features = adapter.adapter(x)
    convert_adapter(folder / "local", folder / "out" / "authors.pth", "tencentarc")
    convert_adapter(folder / "local", folder / "out" / "authors.safetensors", "tencentarc")
    pickled = torch.load(folder / "out" / "authors.pth", weights_only=True)
    state = {name: value.clone() for name, value in load_file(folder / "out" / "authors.safetensors").items()}
    assert set(pickled) == set(state) and all(torch.equal(pickled[name], state[name]) for name in state)
    down = (2,) if kind == "full_adapter_xl" else (1, 2, 3)
    seen = published_features(state, x, factor, down)
    assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
    for name in ("authors.pth", "authors.safetensors"):
        convert_adapter(folder / "out" / name, folder / f"from_{name}", "diffusers")
        again = aligned(T2IAdapter.from_pretrained(folder / f"from_{name}").eval())
        assert all(torch.equal(a, b) for a, b in zip(features, again(x), strict=True)), name
    local = convert_adapter(folder / "out" / "authors.safetensors", folder / "again")
    assert local.notes == ()
    configs = [dict(item.config) for item in (adapter, load_adapter(folder / "again"))]
    assert len({json.dumps({key: config[key] for key in (*SHAPE, *OPTIONS)}) for config in configs}) == 1
    mask = torch.zeros(1, 1, *x.shape[2:])
    mask[..., : x.shape[3] // 2] = 1
    both = torch.cat([x, mask], dim=1)
    found = aligned(load_adapter(folder / "again"))(both)
    assert all(torch.equal(a, b) for a, b in zip(adapter(both), found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_equal_after_a_round_trip(kind: str, tmp_path: Path) -> None:
    check_round_trip(kind, SMALL, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_features_of_the_real_shapes_are_equal_after_a_round_trip(kind: str, tmp_path: Path) -> None:
    """300 MB each, the light one 16 MB; also for ComfyUI and the web UI, in half precision."""
    check_round_trip(kind, REAL, tmp_path)
    for format in ("comfyui", "webui"):
        converted = convert_adapter(tmp_path / "local", tmp_path / f"{format}.safetensors", format, dtype="fp16")
        assert any("fp32 to fp16" in note for note in converted.notes) and any("mask" in n for n in converted.notes)
        half = load_file(tmp_path / f"{format}.safetensors")
        assert {value.dtype for value in half.values()} == {torch.float16}
        convert_adapter(tmp_path / f"{format}.safetensors", tmp_path / f"from_{format}")
        kept = find_adapter(tmp_path / f"from_{format}").load(dtype=None)
        assert kept.dtype == torch.float16
        expected = make(kind, REAL).adapter.half().state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in kept.adapter.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_published_state_dict_of_local_control(prefix: str, tmp_path: Path) -> None:
    """As train_adapter.py saves it, alone or from several processes."""
    adapter = make("full_adapter").adapter
    torch.save({prefix + name: value for name, value in adapter.state_dict().items()}, tmp_path / "adapter_epoch_2.pt")
    condition = {"kind": "canny", "low": 100, "high": 200, "channels_used": "rgb"}
    converted = convert_adapter(tmp_path / "adapter_epoch_2.pt", tmp_path / "local", condition=condition, base="sd15")
    assert converted.notes == ("mask_resize is nearest, as published.",)
    found = find_adapter(tmp_path / "local")
    assert found.local and found.base == "sd15" and found.condition is not None and found.condition.high == 200
    loaded = aligned(found.load())
    assert loaded.config["mask_resize"] == "nearest"
    x, mask = torch.rand(1, 1, 64, 128), torch.zeros(1, 1, 64, 128)
    mask[:, :, 8:40, 24:96] = 1
    features = loaded(torch.cat([x, mask], dim=1))
    for stride, feature, plain in zip((8, 16, 32, 64), features, adapter(x), strict=True):
        resized = F.interpolate(mask, size=(64 // stride, 128 // stride), mode="nearest")  # as published
        assert torch.equal(feature, plain * resized)
    with pytest.raises(ValueError, match="takes conditions of 1 channels, but condition=palette has 3"):
        convert_adapter(tmp_path / "adapter_epoch_2.pt", tmp_path / "x", condition={"kind": "palette"})


def test_a_pickle_is_refused_without_being_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    for name, content in (("bare", Evil()), ("inside", {"conv_in.weight": torch.zeros(1), "x": Evil()})):
        for suffix in (".pth", ".pt", ".bin", ".ckpt"):
            torch.save(content, tmp_path / f"{name}{suffix}")
            with pytest.raises(ValueError, match="objects other than tensors, which are not unpickled") as error:
                convert_adapter(tmp_path / f"{name}{suffix}", tmp_path / "out")
            assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
    torch.load(tmp_path / "bare.pt", weights_only=False)  # what would have happened
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["style_embedding", "proj"], "is a style adapter, which adds words to the prompt"),
        (["task_embedding", "spatial_feat_mapping.0.1.weight"], "is a fuser of CoAdapters"),
        (["control_model.input_hint_block.0.weight"], "is a ControlNet; use it as a ControlNet"),
        (["lora_unet_down.lora_up.weight"], "is a LoRA; use it as a LoRA"),
        (["conv_in.weight", "body.2.down_opt.op.weight"], "halves by convolutions"),
        (["conv_in.weight", "body.0.skep.weight"], "convolutions around its blocks"),
        (["down.weight"], "is not a T2I-Adapter .its first weight is called 'down.weight'"),
    ],
)
def test_other_models_are_named(names: list[str], message: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message) as error:
        convert_adapter(tmp_path / "file.pth", tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    adapter = make("full_adapter")
    convert_adapter(_saved(adapter, tmp_path), tmp_path / "good.safetensors", "tencentarc")
    state = load_file(tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({name: value.to(torch.int8) for name, value in state.items()}, tmp_path / "int8.safetensors")
    save_file({**state, "body.0.block1.weight": torch.zeros(8, 8, 1, 1)}, tmp_path / "shape.safetensors")
    save_file({**state, "conv_in.bias": state["conv_in.bias"] / 0}, tmp_path / "nan.safetensors")
    save_file(
        {name: value for name, value in state.items() if "conv_in.bias" not in name}, tmp_path / "less.safetensors"
    )
    save_file(state, tmp_path / "list.safetensors", {"localctl_adapters": "[1]"})
    wrong = json.dumps({"": {"_class_name": "LocalAdapter", "num_res_blocks": 3}})
    save_file(state, tmp_path / "config.safetensors", {"localctl_adapters": wrong})
    for name, message in {
        "cut": "cannot be read",
        "int8": "holds weights of int8 .*; save it in fp16, bf16 or fp32",
        "shape": "cannot be read",
        "nan": "hold NaN or infinity .adapter.adapter.conv_in.bias.",
        "less": "cannot be read",
        "list": "must be an object with a config for each name",
        "config": "do not fit the config in the file",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            convert_adapter(tmp_path / f"{name}.safetensors", tmp_path / "out")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def _saved(adapter: LocalAdapter, folder: Path, name: str = "adapter") -> Path:
    adapter.save_pretrained(folder / name)
    return folder / name


def test_what_comfyui_does_not_build_is_refused_and_what_the_file_loses_is_said(tmp_path: Path) -> None:
    options = {"mask_condition": True, "level_weights": [1.0, 0.5, 1.0, 1.0], "unconditional_scale": 0.0}
    place = _saved(make("full_adapter", **options), tmp_path)
    notes = " ".join(convert_adapter(place, tmp_path / "a.safetensors", "comfyui").notes)
    lost = "black outside the mask", "weighs its levels by 1, 0.5, 1, 1", "made for 0 times its features"
    assert "'mask_optional' of 'Apply Advanced ControlNet'" in notes and all(said in notes for said in lost)
    notes = " ".join(convert_adapter(place, tmp_path / "b.safetensors", "webui").notes)
    assert "'Effective Region Mask'" in notes
    assert load_adapter(tmp_path / "b.safetensors").config["level_weights"] == options["level_weights"]
    place = _saved(make("full_adapter", {"full_adapter": {**SMALL["full_adapter"], "channels": [8, 16, 24]}}), tmp_path)
    with pytest.raises(ValueError, match=r"cannot load .*: of a full_adapter they build channels \[8, 16, 32, 32\]"):
        convert_adapter(place, tmp_path / "c.safetensors", "comfyui")
    place = _saved(make("light_adapter"), tmp_path)
    with pytest.raises(ValueError, match="of a light_adapter they build channels .320, 640, 1280."):
        convert_adapter(place, tmp_path / "c.safetensors", "webui")
    assert not (tmp_path / "c.safetensors").exists()


def test_several_adapters_in_one_file_and_in_one_folder(tmp_path: Path) -> None:
    first, second = make("full_adapter", mask_resize="inside"), make("light_adapter")
    places = {"edges": _saved(first, tmp_path / "own", "a"), "colours": _saved(second, tmp_path / "own", "b")}
    bundle_adapters(places, tmp_path / "both.safetensors")
    assert list_adapters(tmp_path / "both.safetensors") == ["colours", "edges"]
    assert list_adapters(tmp_path / "own") == ["a", "b"] and list_adapters(tmp_path / "own" / "a") == []
    for name, adapter in (("edges", first), ("colours", second)):
        found = find_adapter(tmp_path / "both.safetensors" / name)
        assert found.local and find_adapter(found.place).load().config["mask_resize"] == adapter.config["mask_resize"]
        loaded = found.load()
        assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="both.safetensors holds 2 adapters; give one of .*both.safetensors/edges"):
        find_adapter(tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="holds 2 adapters; give one of"):
        find_adapter(tmp_path / "both.safetensors" / "third")
    with pytest.raises(ValueError, match="it holds 2 adapters, of which one must be given: .*own/a"):
        find_adapter(tmp_path / "own")
    convert_adapter(tmp_path / "own" / "a", tmp_path / "own" / "one.safetensors", "tencentarc")
    assert list_adapters(tmp_path / "own") == ["a", "b", "one"]
    assert find_adapter(tmp_path / "own" / "one").place == str(tmp_path / "own" / "one.safetensors")
    with pytest.raises(ValueError, match="holds one adapter, none with the name 'x'"):
        find_adapter(tmp_path / "own" / "one.safetensors" / "x")
    with pytest.raises(ValueError, match="The name 'a.b' of an adapter must be of letters"):
        bundle_adapters({"a.b": places["edges"]}, tmp_path / "no.safetensors")


def test_what_a_diffusers_folder_does_not_hold_is_said(tmp_path: Path) -> None:
    place = _saved(make("full_adapter", condition={"kind": "canny"}, base="sd15", mask_resize="nearest"), tmp_path)
    (note,) = convert_adapter(place, tmp_path / "a", "diffusers").notes
    assert note.startswith(
        "A diffusers folder does not hold condition=canny, base=sd15, mask_resize=nearest: give them"
    )
    assert convert_adapter(_saved(make("full_adapter"), tmp_path / "bare"), tmp_path / "b", "diffusers").notes == ()


def test_what_a_pickled_file_does_not_hold_is_said(tmp_path: Path) -> None:
    """Reading a .pt file assumes nearest, as published, reading any other area."""
    place = _saved(make("full_adapter", condition={"kind": "canny"}, base="sd15", mask_resize="nearest"), tmp_path)
    notes = {end: convert_adapter(place, tmp_path / f"a.{end}", "tencentarc").notes for end in ("pt", "pth")}
    assert notes["pt"] == (
        "A .pt file does not hold condition=canny, base=sd15: give them when you import it, or write .safetensors.",
    )
    assert "condition=canny, base=sd15, mask_resize=nearest:" in notes["pth"][0]
    assert convert_adapter(place, tmp_path / "a.safetensors", "tencentarc").notes == ()
    bare = _saved(make("full_adapter"), tmp_path / "bare")
    assert convert_adapter(bare, tmp_path / "b.pth", "tencentarc").notes == ()


def test_dtypes_are_kept_or_their_conversion_is_said(tmp_path: Path) -> None:
    adapter = make("full_adapter")
    place = _saved(adapter, tmp_path)
    for dtype in ("fp16", "bf16"):
        converted = convert_adapter(place, tmp_path / f"{dtype}.safetensors", "tencentarc", dtype=dtype)
        assert converted.notes == (f"The weights are converted from fp32 to {dtype}.",)
        convert_adapter(tmp_path / f"{dtype}.safetensors", tmp_path / dtype)
        weights = load_file(tmp_path / dtype / "diffusion_pytorch_model.safetensors")
        assert {value.dtype for value in weights.values()} == {{"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]}
        assert load_adapter(tmp_path / dtype).dtype == torch.float32
    adapter.adapter.adapter.conv_in.bias.fill_(1e6)
    with pytest.raises(ValueError, match="overflow in fp16; keep fp32"):
        convert_adapter(_saved(adapter, tmp_path), tmp_path / "x.safetensors", "tencentarc", dtype="fp16")
    for options, message in (
        ({"dtype": "float16"}, "Unknown dtype 'float16'; choose one of fp32, fp16, bf16"),
        ({"format": "comfy"}, "Unknown format 'comfy' of an adapter; did you mean comfyui"),
        ({"mask_resiz": "area"}, "has no option 'mask_resiz'; did you mean mask_resize"),
        ({"mask_resize": "soft"}, "Unknown mask_resize 'soft'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_adapter(place, tmp_path / "x", **options)


def test_no_path_of_this_machine_leaves(tmp_path: Path) -> None:
    adapter = make("full_adapter", base=str(tmp_path / "secret" / "base"))
    convert_adapter(_saved(adapter, tmp_path), tmp_path / "out.safetensors", "comfyui")
    assert str(tmp_path).encode() not in (tmp_path / "out.safetensors").read_bytes()
    assert find_adapter(tmp_path / "out.safetensors").base == "base"


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    make("full_adapter").save_pretrained(tmp_path / "one")
    convert_adapter(tmp_path / "one", tmp_path / "two")
    convert_adapter(tmp_path / "one", tmp_path / "two", "diffusers")  # an adapter alone is
    (tmp_path / "two" / "notes.txt").write_text("mine")
    others = tmp_path / "unet"
    others.mkdir()
    (others / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    for place in (tmp_path / "two", others, tmp_path, tmp_path / "two" / "notes.txt"):
        with pytest.raises(ValueError, match="holds other things than an adapter, which would be lost"):
            convert_adapter(tmp_path / "one", place)
    with pytest.raises(ValueError, match="name a new folder"):
        convert_adapter(tmp_path / "one", "..")
    assert (tmp_path / "two" / "notes.txt").read_text() == "mine" and (others / "config.json").exists()


@pytest.mark.parametrize("name", ["..", "a/../../b", "/tmp/b"])
def test_a_name_in_a_file_is_no_path(name: str, tmp_path: Path) -> None:
    file, config = tmp_path / "all.safetensors", {"_class_name": "LocalAdapter", **SMALL["full_adapter"]}
    state = {f"{name}.{key}": value for key, value in make("full_adapter").adapter.state_dict().items()}
    save_file(state, file, as_metadata({name: config}))
    for read in (list_adapters, find_adapter):
        with pytest.raises(ValueError, match="of an adapter must be of letters, digits"):
            read(file)


def test_a_bundle_takes_no_options(tmp_path: Path) -> None:
    make("full_adapter").save_pretrained(tmp_path / "one")
    with pytest.raises(ValueError, match="keeps the options of its adapters; leave base out"):
        convert_adapter(tmp_path / "one", tmp_path / "all.safetensors", "bundle", base="sd15")


def test_a_chosen_resize_is_not_called_published(tmp_path: Path) -> None:
    torch.save(make("full_adapter").adapter.state_dict(), tmp_path / "adapter_epoch_1.pt")
    assert convert_adapter(tmp_path / "adapter_epoch_1.pt", tmp_path / "a").notes[0].endswith("nearest, as published.")
    own = convert_adapter(tmp_path / "adapter_epoch_1.pt", tmp_path / "b", mask_resize="cover")
    assert own.notes[0] == "mask_resize is cover."
