"""Adapters from every kind of place: found, and loaded as they were saved."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import T2IAdapter
from safetensors.torch import save_file
from torch import Tensor

from localctl import adapter_files
from localctl.adapter import LocalAdapter
from localctl.adapter_files import find_adapter

MakeAdapter = Callable[..., LocalAdapter]


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def published(adapter: T2IAdapter) -> dict[str, Tensor]:
    """The weights under the names that T2I-Adapter's authors publish: blocks numbered through all levels, and the
    blocks of light adapters in a ``body`` of their own."""
    light, blocks = adapter.config["adapter_type"] == "light_adapter", adapter.config["num_res_blocks"]
    state = {}
    for name, value in adapter.adapter.state_dict().items():
        found = re.fullmatch(r"body\.(\d+)\.(resnets\.(\d+)|in_conv)\.(.+)", name)
        if light:
            name = name.replace(".resnets.", ".body.")
        elif found:
            block = int(found[1]) * blocks + int(found[3] or 0)
            name = f"body.{block}.{found[4]}" if found[3] else f"body.{block}.in_conv.{found[4]}"
        state[name] = value
    return state


@pytest.fixture
def saved(make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalAdapter:
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter(5, mask_resize="cover", base="sd15")
    adapter.save_pretrained("run/adapter")
    return adapter


def test_a_folder_its_run_its_checkpoint_home_and_its_files(
    saved: LocalAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree("run", "run2/checkpoint-8")
    weights = "run/adapter/diffusion_pytorch_model.safetensors"
    for name in ("run", "run/adapter", "~/run", "run2/checkpoint-8", weights, "run/adapter/config.json"):
        found = find_adapter(name)
        loaded = found.load()
        assert found.local and found.base == "sd15" and loaded.config["mask_resize"] == "cover", name
        assert equal(loaded, saved) and not loaded.training
        assert Path(found.place).is_absolute()


def test_the_only_variant_is_taken_and_read_in_float32(saved: LocalAdapter) -> None:
    for variant in ("fp16", "bf16"):
        saved.adapter.half().save_pretrained(variant, variant=variant)
        for place in (variant, f"{variant}/diffusion_pytorch_model.{variant}.safetensors"):
            found = find_adapter(place)
            loaded = found.load()
            assert found.variant == variant and equal(loaded, saved.float()), place
            assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "channels", "factor", "colours"),
    [
        ("full_adapter", [8, 16, 16, 24], 8, 1),
        ("full_adapter", [8, 16, 24], 8, 3),
        ("full_adapter_xl", [8, 16, 24, 24], 16, 3),
        ("light_adapter", [8, 16, 24], 8, 3),
    ],
)
def test_files_of_weights_alone(kind: str, channels: list[int], factor: int, colours: int, tmp_path: Path) -> None:
    """As diffusers names them, and as published."""
    options = {"in_channels": colours, "channels": channels, "num_res_blocks": 2, "downscale_factor": factor}
    adapter = T2IAdapter(**options, adapter_type=kind)
    save_file(adapter.state_dict(), tmp_path / "diffusers.safetensors")
    save_file(published(adapter), tmp_path / "published.safetensors")
    torch.save(published(adapter), tmp_path / "published.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in published(adapter).items()}}, tmp_path / "wrapped.ckpt")
    (tmp_path / "folder").mkdir()
    torch.save(published(adapter), tmp_path / "folder" / "t2iadapter_canny.bin")
    for name in ("diffusers.safetensors", "published.safetensors", "published.pth", "wrapped.ckpt", "folder"):
        found = find_adapter(tmp_path / name)
        assert {key: found.config[key] for key in options} == options and found.config["adapter_type"] == kind
        loaded = found.load()
        assert isinstance(loaded, LocalAdapter) and equal(loaded.adapter, adapter), name


def test_what_is_no_adapter_is_one_sentence(
    saved: LocalAdapter, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return exec, ("raise SystemExit('executed')",)

    torch.save({"conv_in.weight": Evil()}, "evil.pth")
    torch.save({"down.weight": torch.zeros(2)}, "lora.safetensors.pth")
    save_file({}, "empty.safetensors")
    Path("cut.safetensors").write_bytes(Path("run/adapter/diffusion_pytorch_model.safetensors").read_bytes()[:99])
    shutil.copy("run/adapter/diffusion_pytorch_model.safetensors", "local.safetensors")
    Path("photo.png").write_bytes(b"")
    shutil.copytree("run", "early/checkpoint-8")
    Path("odd").mkdir()
    Path("several").mkdir()
    for name in ("a.safetensors", "b.pth"):
        Path("several", name).write_bytes(b"")
    cases: dict[str, str] = {
        "evil.pth": "cannot be read: the file is damaged, or holds objects other than tensors",
        "several": "2 files of weights, of which one must be given: a.safetensors, b.pth",
        "lora.safetensors.pth": "is not a T2I-Adapter .its first weight is called 'down.weight'",
        "empty.safetensors": "it holds no weights",
        "cut.safetensors": "cannot be read",
        "local.safetensors": "config.json defines how it uses masks; give its folder",
        "photo.png": "is not a file of weights",
        "early": "no config.json in it; its newest checkpoint is early/checkpoint-8",
        "nowhere": "no such folder or file",
        "~nobody-of-that-name/x": "no adapter '~nobody",
        str(sd_folder / "unet"): "names the class 'UNet2DConditionModel'; give a ",
        "odd": "names the class None",
    }
    Path("odd/config.json").write_text("[]")
    for value in ('{"_class_name": "T2IAdapter", "base": ["x"]}', '{"_class_name": "T2IAdapter", "condition": [1]}'):
        Path("odd/config.json").write_text(value)
        with pytest.raises(ValueError, match="of the adapter odd cannot be used: (base|condition) must be "):
            find_adapter("odd")
    Path("odd/config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="odd/config.json is not valid JSON .nested too deep"):
        find_adapter("odd")
    Path("odd/config.json").write_text("[]")
    for name, words in cases.items():
        with pytest.raises(ValueError, match=words) as error:
            find_adapter(name)
        assert "\n" not in str(error.value)


def test_hub_ids_and_files_on_the_hub(saved: LocalAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the hub's own client, which is not asked here."""
    save_file(published(saved.adapter.float()), "weights.safetensors")
    asked = []

    def download(repository: str, file: str, local_files_only: bool) -> str:
        asked.append((repository, file, local_files_only))
        if repository == "no/where":
            raise FileNotFoundError("we cannot find it.\nmore")
        return "run/adapter/config.json" if file == "config.json" else "weights.safetensors"

    monkeypatch.setattr(adapter_files, "hf_hub_download", download)
    found = find_adapter("own/adapter", local_files_only=True)
    assert (found.place, found.local, found.local_files_only) == ("own/adapter", True, True)
    assert equal(find_adapter("own/all/models/one.safetensors").load().adapter, saved.adapter)
    with pytest.raises(ValueError, match="no such folder or file; as a hub id: we cannot find it.; give") as error:
        find_adapter("no/where")
    assert "\n" not in str(error.value)
    assert asked == [
        ("own/adapter", "config.json", True),
        ("own/all", "models/one.safetensors", False),
        ("no/where", "config.json", False),
    ]


def test_only_half_precision_on_the_hub(saved: LocalAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.adapter.half().save_pretrained("half", variant="fp16")
    tried = []
    original = T2IAdapter.from_pretrained

    def from_pretrained(place: str, variant: str | None, **options: Any) -> T2IAdapter:
        tried.append(variant)
        if variant is None:
            raise OSError("no file named diffusion_pytorch_model.bin")
        return original("half", variant=variant, **options)

    monkeypatch.setattr(T2IAdapter, "from_pretrained", from_pretrained)
    config = json.loads(Path("half/config.json").read_text())
    loaded = adapter_files.SavedAdapter("own/half", "own/half", config).load()
    assert tried == [None, "fp16"] and equal(loaded.adapter, saved.adapter.float())


def test_another_base_is_said() -> None:
    found = adapter_files.SavedAdapter("x", "x", {"_class_name": "T2IAdapter", "base": "sd15"})
    assert found.used_on("stable-diffusion-v1-5/stable-diffusion-v1-5") is None
    assert (
        found.used_on("own/model")
        == "The adapter x was trained on sd15 and is used on own/model, which has the same shape."
    )
