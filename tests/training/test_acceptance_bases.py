"""The published recipe on Stable Diffusion 1.5, 2.1 (v) and XL in small, square and not, on every format of data: only
sizes are overridden."""

import hashlib
import json
import math

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import DDIMScheduler, T2IAdapter
from PIL import Image
from tolerances import rounding
from training_helpers import loss_log

from localctl.adapter import LocalAdapter
from localctl.cli.config import load_config
from localctl.control.image_controls import LocalAdapterControl
from localctl.diffusion import predict_x0
from localctl.micro.scenes import scene
from localctl.sampling import generate
from localctl.training import loop
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

SHRUNK = {
    "sd": ("adapter.channels=[8, 16, 16, 24]",),
    "v": ("adapter.channels=[8, 16, 16, 24]",),
    "sdxl": ("adapter=auto",),  # SDXL's kind of adapter, not the recipe's
}
STEPS = 20


def write_scenes(root, data, count=8):
    """Write embedded scenes in the format ``data``, without conditions and masks; return their path."""
    for index in range(count):
        (root / f"{index:02}").mkdir(parents=True)
        image, name = (
            Image.fromarray(scene(index).image),
            f"{index:02}/original.{'jpg' if data == 'folder' else 'png'}",
        )
        image.save(root / name, quality=95)
        (root / f"{index:02}" / "caption.txt").write_text(scene(index).caption)
        with (root / "metadata.jsonl").open("a") as lines:
            lines.write(json.dumps({"file_name": name, "text": scene(index).caption}) + "\n")
    if data != "parquet":
        return root
    rows = [json.loads(line) for line in (root / "metadata.jsonl").read_text().splitlines()]
    images = [{"bytes": (root / row["file_name"]).read_bytes(), "path": row["file_name"]} for row in rows]
    table = pyarrow.table({"image": images, "text": [row["text"] for row in rows]})
    pyarrow.parquet.write_table(table, root / "all.parquet")
    return root / "all.parquet"


def digest(module):
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


SQUARE, WIDE = (64, 64), (64, 96)


@pytest.mark.parametrize(
    ("kind", "data", "size"),
    [
        ("sd", "imagefolder", SQUARE),
        ("v", "parquet", WIDE),
        ("sdxl", "folder", WIDE),
        pytest.param("sd", "folder", WIDE, marks=pytest.mark.slow),
        pytest.param("v", "imagefolder", SQUARE, marks=pytest.mark.slow),
        pytest.param("sdxl", "parquet", SQUARE, marks=pytest.mark.slow),
    ],
)
def test_twenty_steps_of_the_recipe(kind, data, size, request, tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    base, place = request.getfixturevalue(f"{kind}_folder"), write_scenes(tmp_path / "data", data)
    settings = load_config(
        ["experiment=paper_canny", f"base={base}", f"data={data}", f"data.path={place}", "data.validation_share=0",
         f"data.resolution={list(size)}", *SHRUNK[kind], "--report_to", "none", "--max_train_steps", str(STEPS),
         "--num_train_epochs", "null", "--output_dir", str(tmp_path / "run"), "--validation_steps", "0",
         "--logging_steps", "1"],
        TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS,
    )  # fmt: skip
    run = loop.prepare(settings)
    models = run.state.models
    frozen = {name: digest(part) for name, part in models.frozen.items()}
    start = [parameter.detach().clone() for parameter in models.plain_adapter.parameters()]
    reached = watch_features(models)
    run.train()

    rows = loss_log(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "local_raw", "grad_norm"))
    assert len(reached) == 4 and all(reached.values())
    named = list(models.plain_adapter.named_parameters())
    assert [name for (name, p), before in zip(named, start, strict=True) if torch.equal(p, before)] == []
    assert {name: digest(part) for name, part in models.frozen.items()} == frozen

    exported = T2IAdapter.from_pretrained(tmp_path / "run" / "t2iadapter")
    weights = zip(exported.parameters(), models.plain_adapter.adapter.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    adapter = LocalAdapter.from_t2iadapter(exported)
    condition = run.train_source[0].condition
    plain, steered = (
        generate(models.pipe, "a", controls, seeds=[0], height=size[0], width=size[1], num_inference_steps=2).images[0]
        for controls in ([], [LocalAdapterControl(adapter, condition, torch.ones(1, *size))])
    )
    assert plain.size == (size[1], size[0]) and plain.tobytes() != steered.tobytes()


def watch_features(models):
    """Return, by level, whether the gradient of its feature is other than zero."""
    reached = {}

    def hook(module, args, features):
        for level, feature in enumerate(features):
            reached.setdefault(level, False)
            feature.register_hook(lambda g, level=level: reached.update({level: reached[level] or bool(g.any())}))

    models.plain_adapter.register_forward_hook(hook)
    return reached


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_predicted_x0_is_the_schedulers(kind, request):
    scheduler = DDIMScheduler.from_config(request.getfixturevalue(f"{kind}_pipe").scheduler.config)
    scheduler.set_timesteps(1000)
    generator = torch.Generator().manual_seed(0)
    noisy, output = torch.randn(2, 1, 4, 8, 12, generator=generator)
    for t in (1, 500, 981):
        ours = predict_x0(noisy, output, torch.tensor([t]), scheduler.alphas_cumprod, scheduler.config.prediction_type)
        theirs = scheduler.step(output, t, noisy).pred_original_sample
        # The difference of two numbers, which may be much larger, over the root of abar.
        terms = float(noisy.abs().max() + output.abs().max()) / float(scheduler.alphas_cumprod[t]) ** 0.5
        assert torch.allclose(ours, theirs, rtol=0, atol=rounding(5) * terms)
