"""Measure the embedded base: the reader, the VAE, CLIP and generated images; write the model card from the figures."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from localctl.bases import BASES, MICRO_WEIGHTS
from localctl.diffusion import round_trip
from localctl.distributed import process_device
from localctl.drawing import grid
from localctl.layout import Layout
from localctl.metrics.bootstrap import Interval, bootstrap
from localctl.metrics.edges import edge_scores
from localctl.micro.detect import VERSION, Reading, detect
from localctl.micro.scenes import Scene, scene, scene_plan
from localctl.pipelines import BaseConfig, load_pipeline, set_scheduler
from research.flags import RESULTS
from research.harness import Case, first_scenes, generate_cases
from research.micro_base.clip import retrieval_top1
from research.micro_base.flow import JointAttention, velocity
from research.micro_base.transformer import encoder

BATCH, BATCH_ON_GPU = 16, 100  # images at once
STEPS, GUIDANCE, SCHEDULER = 30, BASES["micro"].guidance_scale, "ddim"
FLOORS = {
    "reader: objects right, true scenes": 0.98,
    "VAE round trip: PSNR (dB)": 33.0,
    "VAE round trip: canny 50/100 F1": 0.97,
    "one object: right colour": 0.97,
    "one object: right shape": 0.90,
    "one object: right background": 0.97,
    "two objects: both right": 0.75,
    "two objects: stated relation true, of those with both": 0.80,
    "three objects: all right": 0.40,
    "CLIP: top-1 of 512 captions": 0.60,
}
CEILINGS = {"reader: spurious, true scenes": 0.01, "two objects: more than two objects": 0.10}


def match_objects(item: Scene, reading: Reading, tolerance: float = 5.0) -> tuple[int, int]:
    """Return how many objects were found with their phrase and box (within ``tolerance`` px), and other detections."""
    left = list(reading.objects)
    right = 0
    for truth in item.objects:
        for found in left:
            near = max(abs(a - b) for a, b in zip(found.box, truth.box, strict=True)) <= tolerance
            if near and found.phrase == truth.phrase:
                left.remove(found)
                right += 1
                break
    return right, len(left)


def reader_figures(scenes: list[Scene], images: list[np.ndarray]) -> tuple[Interval, float, float]:
    """Return the share of objects right, spurious detections per true object, and the share of backgrounds right."""
    rows = []
    for item, image in zip(scenes, images, strict=True):
        reading = detect(image)
        hits, spurious = match_objects(item, reading)
        rows.append((hits, spurious, len(item.objects), reading.background == item.background))
    table = np.asarray(rows, float)
    right = bootstrap(table, lambda r: float(r[:, 0].sum() / r[:, 2].sum()))
    return right, float(table[:, 1].sum() / table[:, 2].sum()), float(table[:, 3].mean())


def vae_figures(images: np.ndarray, decoded: np.ndarray) -> tuple[Interval, Interval]:
    """Return the PSNR in dB, and the F1 of canny 50/100 edges (2 px tolerance) over images with edges."""
    error = ((images.astype(np.float64) - decoded) ** 2).mean((1, 2, 3))
    f1 = []
    for image, other in zip(images, decoded, strict=True):
        target, found = (cv2.Canny(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), 50, 100) > 0 for x in (image, other))
        if target.any():  # purple on black may have none
            f1.append(edge_scores(found, target, np.ones_like(target)).f1)
    return bootstrap(10 * np.log10(255**2 / error)), bootstrap(np.asarray(f1))


def is_transformer(pipe: Any) -> bool:
    """Return whether the base is the transformer of ``research.micro_base.transformer``."""
    return hasattr(pipe, "transformer")


def _holds(count: int, item: Scene) -> bool:
    return len(item.objects) == count


def generate_captions(
    pipe: Any, scenes: list[Scene], guidance: float = GUIDANCE, steps: int = STEPS
) -> list[np.ndarray]:
    """Generate an image per caption; image i from the noise of seed i."""
    cases = [Case(str(item.index), item, Layout(item.caption), seed) for seed, item in enumerate(scenes)]
    options: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    if is_transformer(pipe):
        options["max_sequence_length"] = 0  # tokens for the third text encoder, which it does not have
    size = BATCH if pipe.device.type == "cpu" else BATCH_ON_GPU
    return generate_cases(pipe, cases, lambda _: (), size, "captions", **options)


def one_object_figures(scenes: list[Scene], readings: list[Reading]) -> dict[str, Interval]:
    """Return how often the largest object found is the caption's; the background, only where the caption names it."""
    color, shape, background = [], [], []
    for item, reading in zip(scenes, readings, strict=True):
        found = reading.objects[0] if reading.objects else None
        color.append(found is not None and found.color == item.objects[0].color)
        shape.append(found is not None and found.shape == item.objects[0].shape)
        if "background" in item.caption:
            background.append(reading.background == item.background)
    named = {"colour": color, "shape": shape, "background": background}
    return {f"one object: right {name}": bootstrap(np.asarray(v, float)) for name, v in named.items()}


def two_object_figures(scenes: list[Scene], readings: list[Reading]) -> dict[str, Interval]:
    """Return how often both objects are found, more than two are, and a stated relation holds between both."""
    both, relation, extra = [], [], []
    for item, reading in zip(scenes, readings, strict=True):
        first, second = (o.phrase for o in item.objects)
        both.append(reading.has(first) and reading.has(second))
        extra.append(len(reading.objects) > 2)
        if both[-1] and item.relation:
            relation.append(reading.relation(first, item.relation[1], second))
    figures = {"two objects: both right": both, "two objects: more than two objects": extra}
    if relation:
        figures["two objects: stated relation true, of those with both"] = relation
    return {name: bootstrap(np.asarray(v, float)) for name, v in figures.items()}


def three_object_figures(scenes: list[Scene], readings: list[Reading]) -> dict[str, Interval]:
    """Return how often all three objects are found, and how many are."""
    found = np.array([[r.has(o.phrase) for o in s.objects] for s, r in zip(scenes, readings, strict=True)], float)
    return {"three objects: all right": bootstrap(found.min(1)), "three objects: share right": bootstrap(found.mean(1))}


@torch.no_grad()
def padding_mass(pipe: Any, captions: list[str]) -> float:
    """Return the share of cross-attention on end and padding tokens, over all layers, at t = 500.

    Of the transformer, the share among the attention of the image to words and padding.
    """
    ids = pipe.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(pipe.device)  # (B, T)
    words = (ids != pipe.tokenizer.eos_token_id).float()  # (B, T), the start token counts as a word
    latents = torch.randn(len(captions), 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(pipe.device)
    shares: list[float] = []
    if is_transformer(pipe):
        recorded: list[torch.Tensor] = []
        t = torch.full((len(captions),), 770.0, device=pipe.device)  # as much noise as the U-Net's t = 500
        states = encoder(pipe)(captions)
        with JointAttention(ids.shape[1], recorded):
            velocity(pipe.transformer, latents, t, states)
        return float(np.mean([float(1 - (attention * words[:, None]).sum(-1).mean()) for attention in recorded]))
    states = pipe.text_encoder(ids).last_hidden_state

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        query, key = module.to_q(args[0]), module.to_k(kwargs["encoder_hidden_states"])
        query, key = (x.unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in (query, key))  # (B, heads, n, d)
        attention = (query @ key.transpose(-1, -2) * module.scale).softmax(-1)
        shares.append(float(1 - (attention * words[:, None, None]).sum(-1).mean()))

    layers = [m for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in layers]
    try:
        pipe.unet(latents, 500, states)
    finally:
        for handle in handles:
            handle.remove()
    return float(np.mean(shares))


def label(reading: Reading) -> str:
    """Return the objects that the reader found, as a caption."""
    return ", ".join(o.phrase for o in reading.objects) or "nothing"


def sheet(scenes: list[Scene], images: list[Image.Image], readings: list[Reading], columns: int = 5) -> Image.Image:
    """Return a contact sheet: each image between its caption and the objects that the reader found."""
    tiles = [
        grid([[image.resize((256, 256), Image.Resampling.NEAREST)]], [item.caption[:42]], [label(reading)[:42]])
        for item, image, reading in zip(scenes, images, readings, strict=True)
    ]
    return grid([tiles[i : i + columns] for i in range(0, len(tiles), columns)])


Figures = dict[str, Interval | float]
Sheets = dict[str, Image.Image]


def true_scene_figures(pipe: Any, clip: CLIPModel, tokenizer: CLIPTokenizer, share: float) -> tuple[Figures, Sheets]:
    """Return the figures of reader, VAE and CLIP, and a sheet of the VAE; ``share``: of the full number of scenes."""
    many, few = int(1000 * share), int(200 * share)
    scenes = [scene(i, "basic", "test") for i in range(many)]
    images = np.stack([s.image for s in scenes])
    figures: Figures = {}
    names = ("reader: objects right, true scenes", "reader: spurious, true scenes", "reader: background, true scenes")
    figures.update(zip(names, reader_figures(scenes, list(images)), strict=True))
    decoded = round_trip(pipe.vae, images[:few])
    figures["reader: objects right, after the VAE"] = reader_figures(scenes[:few], list(decoded))[0]
    figures["VAE round trip: PSNR (dB)"], figures["VAE round trip: canny 50/100 F1"] = vae_figures(
        images[:few], decoded
    )
    captions = [s.caption for s in scenes[: int(512 * share)]]
    figures["CLIP: top-1 of 512 captions"] = retrieval_top1(clip, tokenizer, images[: len(captions)], captions)
    return figures, {"vae": grid([[Image.fromarray(x) for x in rows[:8]] for rows in (images, decoded)])}


def generated_figures(pipe: Any, share: float, guidance: float = GUIDANCE) -> tuple[Figures, Sheets]:
    """Return the figures and sheets of generated images, all that depends on the denoiser; ``share`` as above."""
    captions = [scene_plan(i, "basic", "test").caption for i in range(32)]
    name = "transformer" if is_transformer(pipe) else "U-Net"
    figures: Figures = {f"{name}: attention on end and padding": padding_mass(pipe, captions)}
    sheets: Sheets = {}
    for count, judge in enumerate((one_object_figures, two_object_figures, three_object_figures), start=1):
        chosen = first_scenes(int(200 * share), partial(_holds, count))
        generated = generate_captions(pipe, chosen, guidance)
        readings = [detect(image) for image in generated]
        figures.update(judge(chosen, readings))
        sheets[f"objects{count}"] = sheet(chosen[:25], list(map(Image.fromarray, generated[:25])), readings[:25])
    return figures, sheets


def table(figures: dict[str, Any]) -> str:
    """Return the figures as a Markdown table, with the limits and whether they are met."""
    lines = ["| figure | measured | wanted | met |", "|---|---|---|---|"]
    for name, value in figures.items():
        floor, ceiling, number = FLOORS.get(name), CEILINGS.get(name), getattr(value, "value", value)
        met = ""
        if floor is not None or ceiling is not None:
            met = "yes" if (floor is None or number >= floor) and (ceiling is None or number <= ceiling) else "no"
        wanted = f">= {floor}" if floor is not None else f"<= {ceiling}" if ceiling is not None else ""
        measured = str(value) if isinstance(value, Interval) else f"{value:.3f}"
        lines.append(f"| {name} | {measured} | {wanted} | {met} |")
    return "\n".join(lines)


def card(figures: dict[str, Any], images: str) -> str:
    """Return the model card. images: folder of the sheets, relative to the card, with a final slash."""
    return f"""# The embedded base, "micro"

A latent diffusion model of the same classes as Stable Diffusion 1.5 (AutoencoderKL, CLIPTextModel,
UNet2DConditionModel; it predicts v, as SD2.1 does) for 128x128 images of coloured shapes, trained from scratch on
procedural scenes by `python -m research.micro_base`. With it, all of localctl runs and can be measured without a
download. It generates only such scenes.

Measured on held-out `basic` scenes by `python -m research.micro_base.report`
({SCHEDULER.upper()}, {STEPS} steps, guidance {GUIDANCE}; 95 % bootstrap intervals over scenes):

{table(figures)}

Errors of the scene reader, version {VERSION}, on generated images: docs/evaluation.md. How it was trained, and what
each training gained: research/results/micro_base/third/README.md. How it uses the words of a caption: docs/log.md.

Captions of one object (above each image the caption, below it what the scene reader found):

![one object]({images}report_objects1.png)

Captions of two objects:

![two objects]({images}report_objects2.png)

Captions of three objects:

![three objects]({images}report_objects3.png)

Eight scenes (top) and their round trip through the autoencoder (bottom):

![round trip]({images}report_vae.png)
"""


def run(base: str, quick: bool, images_only: bool, output_dir: Path, device: str, guidance: float) -> None:
    """Measure and print the figures; unless ``quick``, write card, figures and sheets.

    Figures and sheets of the shipped base are written to research/results/, else beside the card.

    Args:
        quick: measure a fifth of the images.
        images_only: measure generated images only, and write no card.

    Raises:
        ValueError: there is no such base, or it has no CLIP and not only images are to be measured.
    """
    folder = (MICRO_WEIGHTS if base == "micro" else Path(base)) / "clip"
    if not images_only and not folder.is_dir():
        raise ValueError(
            f"There is no CLIP in {folder}; give --base micro, a folder that research.micro_base has exported with its "
            "U-Net, or --images_only."
        )
    pipe = load_pipeline(BaseConfig(name=base), device=process_device(device))
    if not is_transformer(pipe):  # that has flow matching's own
        set_scheduler(pipe, SCHEDULER)
    pipe.set_progress_bar_config(disable=True)
    share = 0.2 if quick else 1.0
    figures: Figures = {}
    sheets: Sheets = {}
    if not images_only:
        clip = CLIPModel.from_pretrained(folder, dtype=torch.float32)
        figures, sheets = true_scene_figures(pipe, clip, CLIPTokenizer.from_pretrained(folder), share)
    generated, more = generated_figures(pipe, share, guidance)
    figures, sheets = figures | generated, sheets | more
    print(table(figures))
    if not quick:
        _write(figures, sheets, output_dir, not images_only)


def _write(figures: Figures, sheets: Sheets, output_dir: Path, with_card: bool) -> None:
    results = RESULTS / "micro_base" if output_dir == MICRO_WEIGHTS.parent else output_dir
    for folder in (output_dir, results):
        folder.mkdir(parents=True, exist_ok=True)
    if with_card:
        images = "" if results == output_dir else f"{Path(os.path.relpath(results, output_dir)).as_posix()}/"
        (output_dir / "MODEL_CARD.md").write_text(card(figures, images))
    plain = {k: vars(v) if isinstance(v, Interval) else v for k, v in figures.items()}
    (results / "report.json").write_text(json.dumps(plain, indent=1))
    for name, image in sheets.items():
        image.save(results / f"report_{name}.png")
