"""What a run leaves behind: the adapter in both forms, its settings, and a model card."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from localctl.files import write_text
from localctl.pipelines import BASES
from localctl.redaction import recorded
from localctl.training.checkpoints import write_folders
from localctl.training.hub import is_local
from localctl.training.models import Models
from localctl.training.settings import TrainSettings
from localctl.training.validation import References, ValidationResult

ADAPTER, T2IADAPTER, CONFIG, CARD = "adapter", "t2iadapter", "config.yaml", "README.md"
BEST = "best"  # the adapter of the best score, where there is a scorer


def write_settings(settings: TrainSettings, folder: Path) -> None:
    """The settings as they were understood, defaults included, secrets masked."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(recorded(settings), sort_keys=False, allow_unicode=True))


def export(
    models: Models,
    settings: TrainSettings,
    step: int,
    folder: Path,
    result: ValidationResult | None,
    references: References | None,
    own_masks: bool = False,
) -> None:
    """Write ``adapter/``, ``t2iadapter/`` and ``README.md`` into ``folder``; both adapters or none. own_masks: the data
    brought its masks.

    Raises:
        OSError: the disk takes no more, named; what was there before stays.
    """
    adapter = models.plain_adapter
    write_folders(folder, {ADAPTER: adapter.save_pretrained, T2IADAPTER: adapter.save_t2iadapter})
    write_text(folder / CARD, model_card(settings, step, result, references, own_masks))


def published(step: int, result: ValidationResult | None) -> list[str]:
    """What of a finished run is for others: patterns of files in its folder."""
    sheets = [] if result is None else [sheet_name(step)]
    return [f"{ADAPTER}/*", f"{T2IADAPTER}/*", CARD, CONFIG, *sheets]


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
    condition, base = settings.condition, _shown(settings.base.name)
    place = str(BASES[base].id_or_path) if base in BASES else settings.base.name
    base_model = "" if is_local(place) else f"base_model: {place}\n"  # the hub refuses what is not an id
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
        share = f"The adapter goes {references.control(fidelity.f1):z.0%} of the way from the base to the ceiling. "
    count = len(fidelity.per_case)
    examples = "example" if count == 1 else "examples"
    return f"""
## Fidelity inside the mask

Canny edges of generated and real pictures, matched within 2 px inside the mask; {count} held-out
{examples}, {config.num_inference_steps} {config.scheduler} steps, guidance {config.guidance_scale:g}. {share}So few
examples are for watching a run; measure with more before comparing.

| | F1 | precision | recall |
|---|---|---|---|
{table}

{sheet}
"""


def _usage(settings: TrainSettings) -> str:
    weights = settings.adapter.level_weights
    levels = "" if weights is None else f" and the weights of the levels, {', '.join(f'{w:g}' for w in weights)}"
    return f"""
## Use

```python
from localctl import LocalAdapter, LocalAdapterControl, generate, load_pipeline

pipe = load_pipeline({_shown(settings.base.name)!r})
adapter = LocalAdapter.from_pretrained("{ADAPTER}")
control = LocalAdapterControl(adapter, condition, mask)  # (C, H, W) and (1, H, W), both in [0, 1]
image = generate(pipe, "a prompt", control, seeds=[0]).images[0]
```

`{T2IADAPTER}/` holds the same weights for `diffusers.T2IAdapter.from_pretrained`, without the masking{levels}.
"""


def _shown(base: str) -> str:
    """A base as others may read it: of a folder its name alone, on one line and without markup."""
    name = base
    if base not in BASES and is_local(base):
        # UTF-8 as on the disk, whatever the locale made of it
        name = os.fsencode(Path(base).expanduser().resolve().name).decode(errors="replace")
    return re.sub(r"[\s`|<>\[\]]+", " ", name).strip()


def _named(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
