"""The benchmarks of training steps and of controls, at small size; the GPU benchmark has a file of its own."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState

from localctl.pipelines import load_pipeline
from research.benchmarks import cache, sample, train_step
from research.benchmarks.steps import CACHED, LIVE, PLAIN, Steps, with_encodings
from research.benchmarks.timing import Deadline, Spread, in_turns, peak_of, ratios

CPU = torch.device("cpu")


def test_variants_take_turns():
    order = []
    times = in_turns({name: lambda name=name: order.append(name) for name in ("a", "b")}, 3, CPU)
    assert order == ["a", "b"] * 3
    assert [len(found) for found in times.values()] == [3, 3]


def test_rounds_end_with_the_deadline():
    assert len(in_turns({"a": lambda: None}, 5, CPU, Deadline(0))["a"]) == 1


def test_a_ratio_says_how_many_times_as_fast():
    found = ratios({"plain": [2.0, 4.0, 6.0], "ours": [1.0, 2.0, 2.0]}, "ours", "plain")
    assert found == Spread(2.0, 2.0, 2.5)
    assert found.text() == "2.00 (2.00 to 2.50)"


def test_the_peak_is_that_of_the_live_tensors():
    def run():
        for _ in range(3):
            torch.zeros(2**18)  # 1 MiB, freed at once

    assert peak_of(run, CPU) == pytest.approx(1)


@pytest.fixture(autouse=True)
def any_precision():
    """Others may have used another precision, which accelerate keeps for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    settings = train_step.settings_of(2, tmp_path_factory.mktemp("steps"))
    pipe = load_pipeline("micro")
    return settings, [with_encodings(batch, pipe) for batch in train_step.batches(2, settings)[:1]]


def weights_after(variant, prepared, folder):
    settings, pool = prepared
    steps = Steps(variant, settings, folder)
    steps.use(pool)
    before = torch.cat([p.detach().flatten().clone() for p in steps.state.models.plain_adapter.parameters()])
    steps(2)  # the learning rate of the first one is 0
    after = torch.cat([p.detach().flatten() for p in steps.state.models.plain_adapter.parameters()])
    unet = next(iter(steps.state.models.network.parameters()))
    steps.release()
    return before, after, unet


def test_every_step_trains_the_adapter_and_only_the_plain_one_computes_gradients_of_the_unet(prepared, tmp_path):
    found = {one.name: weights_after(one, prepared, tmp_path / one.name) for one in (PLAIN, CACHED, LIVE)}
    for (_, (start, *_)), (_, (other, *_)) in itertools.pairwise(found.items()):
        assert torch.equal(start, other)
    for name, (before, after, unet) in found.items():
        assert not torch.equal(before, after), name
        assert (unet.grad is not None) == (name == PLAIN.name), name


def test_encodings_give_the_cached_step_the_latents_of_the_live_one(prepared, tmp_path):
    settings, pool = prepared
    steps = Steps(LIVE, settings, tmp_path / "live")
    models, [batch] = steps.state.models, pool
    noise = torch.zeros(2, *models.latent_shape(128, 128))
    live, cached = (models.encode(replace(batch, moments=m), noise) for m in (None, batch.moments))
    steps.release()
    assert torch.allclose(live, cached, atol=1e-5)


def test_the_step_benchmark_prints_a_line_for_each_step(capsys):
    flags = ["--variants", "cached", "--batch", "1", "--rounds", "1", "--wait_steps", "1", "--memory"]
    assert train_step.main(flags) == 0
    out = capsys.readouterr().out
    for name in ("plain step", "cached"):
        assert re.search(rf"^\| {name} \| \d+ .* \| \d+\.\d+ ", out, re.MULTILINE), out
    assert re.search(r"data-wait share of 1 steps with no workers: \d", out)


def test_memory_is_measured_for_one_step_alone(capsys):
    assert train_step.main(["--alone", "cached", "--batch", "2"]) == 0
    assert float(capsys.readouterr().out.split()[-1]) > 20  # the U-Net alone takes more


def test_the_control_benchmark_compares_each_control_to_the_plain_run(capsys):
    flags = ["--controls", "adapter", "bias", "guidance", "--batch", "1", "--steps", "1", "--rounds", "1"]
    assert sample.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[1:]] == ["none", "adapter", "bias", "guidance"]
    assert "+0.0% over plain" in lines[1] and all("peak" in line for line in lines[1:])


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_scenes_have_any_number_of_regions(count):
    layout = sample.scene(count)
    assert len(layout.regions) == count
    assert all(layout.characters(region) is not None for region in layout.regions)


def test_too_many_regions_are_refused():
    with pytest.raises(ValueError, match="There are 17 regions; choose 1 to 16."):
        sample.scene(17)


def test_the_cache_benchmark_encodes_every_scene_once(capsys):
    assert cache.main(["--count", "12"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"encoded 12 \w+ and \d+ \w+ in .* rows/s, .* KiB per row", out), out
    assert re.search(r"again: .* s, 0 rows encoded", out), out
    assert re.search(r"second epoch: \d+ examples/s", out), out
