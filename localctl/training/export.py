"""What a run leaves behind: the adapter in both forms, its settings, and a model card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from localctl.base import BASES
from localctl.files import share_weights
from localctl.run.record import recorded
from localctl.training.hub import push
from localctl.training.models import Models
from localctl.training.settings import TrainSettings
from localctl.training.validation import References, ValidationResult

ADAPTER, T2IADAPTER, CONFIG, CARD = "adapter", "t2iadapter", "config.yaml", "README.md"
BEST = "best"  # the adapter of the best score, where there is a scorer


def write_settings(settings: TrainSettings, folder: Path) -> None:
    """The settings as they were understood, defaults included, secrets masked."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(recorded(settings), sort_keys=False))


def export(
    models: Models,
    settings: TrainSettings,
    step: int,
    folder: Path,
    result: ValidationResult | None,
    references: References | None,
    own_masks: bool = False,
) -> None:
    """Write ``adapter/``, ``t2iadapter/`` and ``README.md`` into ``folder``; upload it with ``push_to_hub``. own_masks:
    the data brought its masks."""
    models.plain_adapter.save_pretrained(folder / ADAPTER)
    models.plain_adapter.save_t2iadapter(folder / T2IADAPTER)
    for name in (ADAPTER, T2IADAPTER):
        share_weights(folder / name)
    (folder / CARD).write_text(model_card(settings, step, result, references, own_masks))
    if settings.push_to_hub:
        pictures = [] if result is None else [sheet_name(step)]
        push(folder, settings, [f"{ADAPTER}/*", f"{T2IADAPTER}/*", CARD, CONFIG, *pictures])


def sheet_name(step: int) -> str:
    """Where the validation grid of ``step`` lies, relative to the run's folder."""
    return f"validation/step-{step:06d}.png"


def model_card(
    settings: TrainSettings,
    step: int,
    result: ValidationResult | None,
    references: References | None,
    own_masks: bool = False,
) -> str:
    """Markdown with the metadata block that the Hugging Face hub reads."""
    condition, base = settings.condition, settings.base.name
    place = BASES[base].id_or_path if base in BASES else base
    base_model = "" if Path(place).exists() else f"base_model: {place}\n"  # the hub refuses what is not an id
    card = f"""---
library_name: diffusers
{base_model}tags: [t2iadapter, localctl, text-to-image, diffusers-training, {condition.kind}]
---

# Local {condition.kind} adapter for {base}

A T2I-Adapter that makes the base follow a {condition.kind} condition inside a mask and leaves it free outside
(white = controlled). Trained with localctl for {step} steps.

| trained with | |
|---|---|
| base | {base} (frozen) |
| condition | {_named(asdict(condition))} |
| masks | {"of the data" if own_masks else _named(asdict(settings.mask))} |
| loss | denoising + {_named(asdict(settings.loss))} |
| optimizer | AdamW, {settings.lr_scheduler} from {settings.learning_rate:g}, batch {effective_batch(settings)} |
| timesteps | {settings.timestep_sampling}; {settings.proportion_empty_prompts:.0%} empty prompts |
| seed | {settings.seed} |
"""
    if result is not None:
        card += _figures(settings, step, result, references)
    return card + _usage(settings)


def effective_batch(settings: TrainSettings) -> int:
    """Samples per step and process."""
    return settings.train_batch_size * settings.gradient_accumulation_steps


def _figures(settings: TrainSettings, step: int, result: ValidationResult, references: References | None) -> str:
    config, fidelity = settings.validation, result.fidelity
    sheet = f"![Condition with the mask's outline, generated, its condition, real]({sheet_name(step)})"
    if not fidelity.scored:
        return f"\n## Held-out examples\n\nNot scored: their masks hold too few edges.\n\n{sheet}\n"
    rows = [("with the adapter", fidelity)]
    if references is not None:
        rows = [("base alone", references.base), *rows, ("real picture through the VAE", references.round_trip)]
    table = "\n".join(f"| {name} | {f.f1:.3f} | {f.precision:.3f} | {f.recall:.3f} |" for name, f in rows)
    share = ""
    if references is not None:
        share = f"The adapter goes {references.control(fidelity.f1):.0%} of the way from the base to the ceiling. "
    return f"""
## Fidelity inside the mask

Canny edges of generated and real pictures, matched within 2 px inside the mask; {len(fidelity.per_case)} held-out
examples, {config.num_inference_steps} {config.scheduler} steps, guidance {config.guidance_scale:g}. {share}So few
examples are for watching a run; measure with more before comparing.

| | F1 | precision | recall |
|---|---|---|---|
{table}

{sheet}
"""


def _usage(settings: TrainSettings) -> str:
    return f"""
## Use

```python
from localctl import LocalAdapter, LocalAdapterControl, generate, load_pipeline

pipe = load_pipeline({settings.base.name!r})
adapter = LocalAdapter.from_pretrained("{ADAPTER}")
control = LocalAdapterControl(adapter, condition, mask)  # (C, H, W) and (1, H, W), both in [0, 1]
image = generate(pipe, "a prompt", control, seeds=[0]).images[0]
```

`{T2IADAPTER}/` holds the same weights for `diffusers.T2IAdapter.from_pretrained`, without the masking.
"""


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
