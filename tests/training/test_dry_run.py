"""Costs computed from shapes, compared with published values and with real tensors."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_helpers import tiny_settings

from localctl.architectures import TABLE, BaseShape, read_shape
from localctl.cli import train as train_adapter
from localctl.data import MaskedSamples, MicroScenes, SampleRef, collate
from localctl.masks import MaskConfig
from localctl.pipelines import BaseConfig
from localctl.settings import LossConfig
from localctl.training.adapter_plan import plan_adapter
from localctl.training.cost import Estimator, count_step, report
from localctl.training.models import load_models
from localctl.training.operations import OperationWatch
from localctl.training.step import sample_noise, training_step

MICRO_DIT = Path(__file__).parents[2] / "examples" / "micro_dit"
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd21": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions"),
    [("pixart", 610.9), ("sd3", 2243.2), ("flux", 11901.4), ("qwen_image", 20430.4), ("z_image", 6154.9)],
)
def test_the_table_of_bases_has_the_transformers_of_published_size(name, millions):
    network = BaseShape(TABLE[name]).build("transformer")
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_the_table_of_bases_has_their_published_numbers_of_parameters(name):
    shape = BaseShape(TABLE[name])
    counted = {part: sum(p.numel() for p in shape.build(part).parameters()) for part in shape.parts}
    assert counted == PARAMETERS[name]


def test_flops_of_the_real_sd15_at_512_px(tmp_path):
    shape = BaseShape(TABLE["sd15"])
    options = plan_adapter(tiny_settings("sd15", tmp_path), shape).options
    cost = count_step(shape, options, (512, 512))
    assert cost.flops == pytest.approx(1.745e12, rel=0.02)
    assert cost.vae_flops == pytest.approx(1.117e12, rel=0.02)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_flops_are_those_of_the_real_step(kind, request, tmp_path):
    """Count the operations of a real training step with torch, attention as matrix products."""
    settings = tiny_settings(request.getfixturevalue(f"{kind}_folder"), tmp_path)
    models = load_models(settings, torch.device("cpu"), None)
    models.network.set_attn_processor(eager_attention())
    models.vae.set_attn_processor(eager_attention())
    batch = collate([MaskedSamples(MicroScenes(count=1), MaskConfig(), 0)[SampleRef(0, 0)]])
    batch = replace(batch, mask=torch.ones_like(batch.mask))
    sampled = sample_noise(batch, models.latent_shape(128, 128), settings)
    models.keep_encodings(1, (128, 128), images=True)
    models.text_states(batch.captions)  # kept: the text encoder does not run below
    with FlopCounterMode(display=False) as encoder:
        models.encode(batch, sampled.posterior)
    plain = replace(settings, loss=replace(settings.loss, filter="none"))
    with FlopCounterMode(display=False) as counter:
        training_step(batch, models, plain, sampled).loss.backward()
    cost = count_step(read_shape(settings.base), plan_adapter(settings).options, (128, 128))
    assert cost.vae_flops == encoder.get_total_flops()
    assert cost.flops == pytest.approx(counter.get_total_flops(), rel=0.01)


def eager_attention():
    from diffusers.models.attention_processor import AttnProcessor

    return AttnProcessor()


def test_alive_bytes_are_those_that_nobody_has_freed():
    with OperationWatch() as watch:
        first = torch.empty(1000, device="meta")
        kept = first * 2
        assert watch.now == 8000
        kept.view(10, 100)
        del first
        assert (watch.now, watch.peak) == (4000, 8000)
        for _ in range(5):
            kept = kept + 1
    assert (watch.now, watch.peak) == (4000, 8000)


def test_memory_counts_what_it_should(sd_folder, tmp_path):
    settings = tiny_settings(sd_folder, tmp_path, mixed_precision="no")
    estimator = Estimator(settings, read_shape(settings.base))
    settings = replace(settings, train_batch_size=2)
    models = load_models(settings, torch.device("cpu"), None)
    trained = sum(p.numel() for p in models.plain_adapter.parameters())
    frozen = sum(p.numel() for part in models.frozen.values() for p in part.parameters())

    def estimate(**changes):
        return estimator.estimate(replace(settings, **changes), settings.data.size)

    full = estimate()
    assert (full.trained, full.frozen) == (trained, frozen)
    assert full.weights == 4 * (trained + frozen) and full.gradients == 4 * trained and full.optimizer == 8 * trained
    half = estimate(mixed_precision="bf16", use_8bit_adam=True, use_ema=True)
    assert half.weights == 2 * frozen + 10 * trained and half.optimizer == 2 * trained  # with autocast's copies
    assert half.activations == pytest.approx(full.activations / 2, rel=0.02)
    assert estimate(train_batch_size=6).activations == 3 * full.activations
    assert estimate(gradient_checkpointing=True).activations < full.activations


def saved_bytes(settings, dtype):
    """Return the bytes that a real step keeps for its gradients, beside weights and their copies."""
    models = load_models(settings, torch.device("cpu"), dtype)
    batch = collate([MaskedSamples(MicroScenes(count=1), MaskConfig(), 0)[SampleRef(0, 0)]])
    sampled = sample_noise(batch, models.latent_shape(128, 128), settings)
    parts = [models.plain_adapter, *models.frozen.values()]
    weights = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    known, shapes = {tensor.data_ptr() for tensor in weights}, {tensor.shape for tensor in weights}
    saved = {}

    def pack(tensor):
        if tensor.data_ptr() not in known and not (type(tensor.grad_fn).__name__ == "ToCopyBackward0"
                                                   and tensor.shape in shapes):  # fmt: skip
            saved[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other takes its place
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None)
    with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        training_step(batch, models, settings, sampled)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def test_what_transformers_keep_in_float32_is_counted(tmp_path):
    """Half of what is kept in float32 would be a sixth less than what is kept in bf16."""
    plain = LossConfig(filter="none")
    settings = tiny_settings(MICRO_DIT, tmp_path, loss=plain, max_sequence_length=0)
    saved = saved_bytes(settings, torch.bfloat16) / saved_bytes(settings, None)
    options, shape = plan_adapter(settings).options, read_shape(settings.base)
    counts = [
        count_step(shape, options, (128, 128), dtype=dtype, tokens=0).activations
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert saved > 0.57 and counts[0] / counts[1] == pytest.approx(saved, rel=0.02)
    longer = count_step(shape, options, (128, 128), tokens=64)
    assert (
        longer.activations > 1.2 * counts[1] and longer.flops > count_step(shape, options, (128, 128), tokens=0).flops
    )


def test_the_command_prints_a_table_and_ways_out(sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("localctl.training.cost.SIZES", {"sd15": 128})
    argv = [f"base={sd_folder}", "--dry_run", "--output_dir", str(tmp_path / "out"), "--train_batch_size", "4"]
    assert train_adapter.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["base", "size", "batch"]
    assert f"these settings: {sd_folder}" in lines[1] and "128x128" in lines[1]
    assert [line.split()[0] for line in lines[2:6]] == ["sd15"] * 4 and len({len(line) for line in lines[:6]}) == 1
    text = "\n".join(lines)
    for flag in ("bf16", "--gradient_checkpointing", "--gradient_accumulation_steps 4", "--use_8bit_adam", "all of"):
        assert flag in text
    assert not (tmp_path / "out").exists()


def test_what_does_not_go_together_is_said(sdxl_folder, tmp_path):
    settings = tiny_settings(sdxl_folder, tmp_path)
    with pytest.raises(ValueError, match="adapter would make features"):
        report(replace(settings, adapter=replace(settings.adapter, adapter_type="full_adapter")))
    with pytest.raises(ValueError, match="could not be loaded"):
        report(replace(settings, base=BaseConfig(name="nobody/nothing", local_files_only=True)))
