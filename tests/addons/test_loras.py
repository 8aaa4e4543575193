"""LoRAs: the sum of the weights while they act, and the base bit for bit without them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from addon_files import as_kohya, lora_state, save_lora
from attachment_helpers import assert_same_draw
from safetensors.torch import save_file
from torch import Tensor, nn

from localctl.addons.loras import SavedLora, find_lora, parse_use, with_loras
from localctl.architectures import read_shape
from localctl.control.region_bias import RegionBias
from localctl.layout import Layout, Region
from localctl.pipelines import BaseConfig
from localctl.sampling import generate

LAYOUT = Layout("a cat, dogs", 64, 64, (Region("a cat", (0, 0, 0.5, 1)),))


def images(pipe: Any, controls: Any = ()) -> Tensor:
    return torch.stack(generate(pipe, LAYOUT, controls, [1, 2], num_inference_steps=2, output_type="latent").images)


def names(pipe: Any) -> list[tuple[str, str, list[str]]]:
    parts = [getattr(pipe, name, None) for name in ("unet", "text_encoder", "text_encoder_2")]
    return [
        (name, type(module).__name__, sorted(vars(module)))
        for part in parts
        if part is not None
        for name, module in part.named_modules()
    ]


def merged(pipe: Any, state: dict[str, Tensor], scale: float) -> None:
    """Add the factors to the weights themselves."""
    for name, down in state.items():
        if ".lora_A" in name:
            part, _, layer = name.split(".lora_A")[0].partition(".")
            model = getattr(pipe, part)
            layer = layer if hasattr(model, "text_model") else layer.removeprefix("text_model.")
            module = model.get_submodule(layer)
            assert isinstance(module, nn.Linear)
            module.weight.data += scale * state[name.replace("lora_A", "lora_B")] @ down


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_lora_acts_as_its_sum_and_leaves_no_trace(kind: str, tmp_path: Path, request: Any) -> None:
    pipe = request.getfixturevalue(f"{kind}_pipe")
    parts = ("unet", "text_encoder", *(("text_encoder_2",) if kind == "sdxl" else ()))
    state = lora_state(pipe, 1, *parts, size=0.2)
    save_file(state, tmp_path / "style.safetensors")
    plain, before = images(pipe), names(pipe)
    with with_loras(pipe, [tmp_path / "style.safetensors"]) as use:
        assert torch.equal(images(pipe), plain)
        use({"style": 0.5})
        assert not any(parameter.requires_grad for parameter in pipe.unet.parameters())
        found = images(pipe)
        use({})
        assert torch.equal(images(pipe), plain)
    assert torch.equal(images(pipe), plain) and names(pipe) == before
    merged(pipe, state, 0.5)
    assert (found - plain).abs().max() > 1e-2
    assert_same_draw(found, images(pipe))


def test_several_loras_are_summed_under_controls(sd_pipe: Any, tmp_path: Path) -> None:
    files = [save_lora(tmp_path / f"{name}.safetensors", sd_pipe, seed, size=0.2) for seed, name in enumerate("ab")]
    bias = RegionBias(strength=0.5)
    plain = images(sd_pipe, bias)
    with with_loras(sd_pipe, [files[0], f"other={files[1]}"]) as use:
        use({"a": 1.0, "other": 0.5})
        both = images(sd_pipe, bias)
        use({"other": 0.5})
        one = images(sd_pipe, bias)
        use({"other": 0.5, "a": 0.0})
        assert torch.equal(images(sd_pipe, bias), one)
        with pytest.raises(ValueError, match="no LoRA 'b'; loaded are a, other"):
            use({"b": 1.0})
    assert torch.equal(images(sd_pipe, bias), plain)
    for seed, scale in ((0, 1.0), (1, 0.5)):
        merged(sd_pipe, lora_state(sd_pipe, seed, size=0.2), scale)
    assert_same_draw(both, images(sd_pipe, bias))
    assert (both - one).abs().max() > 1e-3


def test_kohyas_names_and_alphas_are_read(sd_pipe: Any, tmp_path: Path) -> None:
    state = lora_state(sd_pipe, 1, "unet", "text_encoder", size=0.2)
    save_file(state, tmp_path / "ours.safetensors")
    save_file(as_kohya(state, alpha=1.0), tmp_path / "theirs.safetensors")  # of rank 2: half the effect
    with with_loras(sd_pipe, [tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"]) as use:
        use({"ours": 0.5})
        ours = images(sd_pipe)
        use({"theirs": 1.0})
        assert torch.equal(images(sd_pipe), ours)


def test_scales_by_prompt_are_parsed() -> None:
    known = {"style": 0.7, "red": 1.0}
    assert parse_use("all", known) == known and parse_use("none", known) == {}
    assert parse_use("style:0.2+red", known) == {"style": 0.2, "red": 1.0}
    for text, message in (
        ("blue", "no LoRA 'blue'; choose among style, red"),
        ("red+red:2", "occurs twice"),
        ("all+style:0.2", "'all' stands alone, not as in 'all[+]style:0.2'"),
        ("none:0.5", "'none' stands alone"),
        ("red:x", "not a finite number"),
        ("red:nan", "not a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_use(text, known)


def test_what_cannot_act_is_refused(
    sd_pipe: Any, sdxl_pipe: Any, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = read_shape(BaseConfig(name=str(sd_folder)))
    large = save_lora(tmp_path / "large.safetensors", sdxl_pipe)
    with pytest.raises(ValueError, match="text of width 32 but this base has 16"):
        find_lora(large).check(shape)
    two = save_lora(tmp_path / "two.safetensors", sdxl_pipe, 1, "text_encoder_2")
    with pytest.raises(ValueError, match="second text encoder"):
        find_lora(two).check(shape)
    with pytest.raises(ValueError, match="does not fit this base"), with_loras(sd_pipe, [large]):
        pass
    assert not hasattr(sd_pipe.unet, "peft_config")
    state = lora_state(sd_pipe, 1)
    for change, message in (
        ({"unet.nowhere.lora_A.weight": torch.ones(2, 4), "unet.nowhere.lora_B.weight": torch.ones(4, 2)}, "not there"),
        ({"unet.mid_block.attentions.0.lora_mid.weight": torch.ones(2, 4)}, "does not fit"),
    ):
        save_file({**state, **change}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=message), with_loras(sd_pipe, [tmp_path / "other.safetensors"]):
            pass
    good = save_lora(tmp_path / "good.safetensors", sd_pipe)
    find_lora(good).check(shape)
    with pytest.raises(ValueError, match="2 LoRAs are called 'good'"), with_loras(sd_pipe, [good, good]):
        pass
    with (
        pytest.raises(ValueError, match="1 LoRA is called 'all'; give another name"),
        with_loras(sd_pipe, [f"all={good}"]),
    ):
        pass
    with with_loras(sd_pipe, [good]), pytest.raises(ValueError, match="LoRAs already"), with_loras(sd_pipe, [good]):
        pass
    save_file({"a.dora_scale": torch.ones(2), "a.lora_down.weight": torch.ones(2, 2)}, tmp_path / "dora.safetensors")
    with pytest.raises(ValueError, match="is a DoRA"):
        find_lora(tmp_path / "dora.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is not a LoRA"):
        find_lora(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="6 .safetensors files"):
        find_lora(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run: pip install 'localctl\[peft\]'"):
        find_lora(good)


def test_names_come_from_files_or_are_given(sd_pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "style v1.5").mkdir()
    file = save_lora(tmp_path / "style v1.5" / "pytorch_lora_weights.safetensors", sd_pipe)
    found = find_lora(tmp_path / "style v1.5")
    assert (found.name, found.weights.path) == ("style_v1_5", file)
    assert find_lora(f"s={file}").place == f"s={file}"
    assert isinstance(found, SavedLora) and found.place == f"style_v1_5={file}"


def test_a_full_device_is_not_called_a_misfit(sd_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr("localctl.addons.loras._inject", full)
    with (
        pytest.raises(torch.cuda.OutOfMemoryError),
        with_loras(sd_pipe, [save_lora(tmp_path / "a.safetensors", sd_pipe)]),
    ):
        pass


def test_pickles_are_not_read(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"a": Payload()}, tmp_path / "evil.pt")
    for place in (tmp_path / "evil.pt", tmp_path):
        with pytest.raises(ValueError, match="can run code when they are read"):
            find_lora(place)
    (tmp_path / "evil.safetensors").write_bytes((tmp_path / "evil.pt").read_bytes())
    with pytest.raises(ValueError, match="damaged or cut off"):
        find_lora(tmp_path / "evil.safetensors")
    for missing in ("nowhere.safetensors", "/nowhere/x.safetensors"):
        with pytest.raises(ValueError, match="There is no LoRA"):
            find_lora(missing)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_on_the_hub_is_refused_before_it_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("localctl.addons.files.hf_hub_download", lambda *args, **options: fetched.append(args[1]))
    with pytest.raises(ValueError, match="is a .ckpt file, and such files can run code"):
        find_lora("owner/name/big.ckpt")
    assert not fetched
