"""What transformers cost: counts without weights, overheads on small ones, and the page of both."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from localctl.denoisers import denoiser_of
from research.benchmarks import families, families_overhead
from research.benchmarks.families_report import read_rows, report
from research.benchmarks.family_shapes import (
    CLASSES,
    SHAPES,
    TINY,
    bare_pipeline,
    latent_channels,
    made_texts,
    new_transformer,
)

# As published: of FLUX.1 dev, Qwen-Image and Z-Image exactly, of the others to the digits that their authors state.
PARAMETERS = {
    "pixart_sigma": (0.61e9, 0.01e9),
    "sd35_medium": (2.243e9, 0.001e9),
    "sd35_large": (8.057e9, 0.001e9),
    "flux1_dev": (11_901_408_320, 0),
    "flux2_klein_4b": (3.9e9, 0.1e9),
    "flux2_dev": (32.2e9, 0.1e9),
    "qwen_image": (20_430_401_088, 0),
    "z_image": (6_154_908_736, 0),
}


_SLOW = ("flux", "flux2", "qwen_image")  # FLUX's count is tried with the GPU benchmark, too


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in CLASSES],
)
def counted(request, tmp_path_factory):
    """The row of one base of a family, in small."""
    base = next(name for name, shape in SHAPES.items() if shape.family == request.param)
    folder = tmp_path_factory.mktemp("families")
    assert families.main(["--tiny", "--bases", base, "--sizes", "64", "--output_dir", str(folder)]) == 0
    [row] = read_rows(folder)
    return row


@pytest.mark.parametrize("base", SHAPES)
def test_the_shapes_are_those_of_the_published_weights(base):
    shape, (number, digits) = SHAPES[base], PARAMETERS[base]
    transformer = new_transformer(shape.family, shape.config, torch.device("meta"), torch.bfloat16)
    assert abs(sum(parameter.numel() for parameter in transformer.parameters()) - number) <= digits
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


def test_a_step_costs_more_than_a_call_and_with_checkpointing_more_again(counted):
    assert 0 < counted["forward_tflop"] < counted["step_tflop"] < counted["step_checkpointed_tflop"]
    assert 0 < counted["activations_checkpointed_gib"] <= counted["activations_gib"]


def test_a_count_without_weights_is_that_of_a_run(counted):
    """The same transformer with weights on a CPU, under torch's own counter, which sees attention as products."""
    family = counted["family"]
    transformer = new_transformer(family, TINY[family], torch.device("cpu"), torch.float32)
    denoiser = denoiser_of(bare_pipeline(family, transformer))
    conditioning = denoiser.conditioning(made_texts(denoiser, torch.ones), (64, 64), [None])
    counter, products = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), counter, products:
        denoiser.output(torch.ones(1, latent_channels(denoiser), 8, 8), torch.ones(1), conditioning)
    assert counted["forward_tflop"] * 1e12 == pytest.approx(counter.get_total_flops())


def test_the_page_has_the_tables_of_the_stored_rows():
    rows = read_rows(families.FOLDER)
    assert {row["base"] for row in rows if "side" in row} == set(SHAPES)
    assert report(rows) in families.PAGE.read_text()


@pytest.mark.slow
def test_a_stored_row_is_counted_again(tmp_path):
    stored = next(row for row in read_rows(families.FOLDER) if row["base"] == "pixart_sigma" and row["side"] == 512)
    assert families.main(["--bases", "pixart_sigma", "--sizes", "512", "--output_dir", str(tmp_path)]) == 0
    assert read_rows(tmp_path) == [stored]


def test_controls_are_timed_beside_a_run_without_any_and_refusals_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(families_overhead, "SIDE", 64)
    monkeypatch.setattr(families_overhead, "STEPS", 1)
    rows = list(families_overhead.overhead_rows(1, ["flux"]))
    assert [row["control"] for row in rows] == ["none", "adapter", "bias", "dense", "spacetime", "guidance", "negative"]
    assert rows[0]["overhead"] == 0 and rows[5]["overhead"] > 0.3
    assert "negative prompt" in rows[-1]["refused"]
    (tmp_path / "overheads.jsonl").write_text("\n".join(map(json.dumps, rows)))
    *_, line, _, memory = report(read_rows(tmp_path)).splitlines()
    assert memory.startswith("Live tensors take at most ")
    assert line.startswith("| `flux`, 64 px |") and line.endswith("| refused |")
