"""The output of a finished run: the adapter as LocalAdapter and T2IAdapter, its settings, a model card; and the upload
to the Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, get_token

from localctl.adapter import TOKENS, LocalAdapter
from localctl.bases import BASES
from localctl.files import first_line, read_json, remove, write_json, write_text
from localctl.redaction import recorded
from localctl.training.checkpoints import write_folders
from localctl.training.settings import TrainSettings
from localctl.training.validation import References, ValidationResult

ADAPTER, T2IADAPTER, CONFIG, CARD = "adapter", "t2iadapter", "config.yaml", "README.md"
BEST = "best"  # the adapter with the best score, if there is a scorer
UPLOAD = "hub"  # folder of the files to upload, without private paths; it remains if the upload fails


def write_settings(settings: TrainSettings, folder: Path) -> None:
    """Write the settings in full, defaults included, secrets masked."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, yaml.safe_dump(recorded(settings), sort_keys=False, allow_unicode=True))


@dataclass(frozen=True)
class Finished:
    """What the model card describes. result: of the last validation. own_masks: the dataset has masks."""

    settings: TrainSettings
    step: int
    result: ValidationResult | None = None
    references: References | None = None
    own_masks: bool = False


def export(adapter: LocalAdapter, run: Finished, folder: Path) -> None:
    """Write ``adapter/``, ``t2iadapter/`` and ``README.md`` into ``folder``; both adapters or none. An adapter for a
    transformer, for which diffusers has no class, is written once.

    Raises:
        OSError: a file could not be written; the message names it, and earlier files stay.
    """
    plain = {} if adapter.config["adapter_type"] == TOKENS else {T2IADAPTER: adapter.save_t2iadapter}
    write_folders(folder, {ADAPTER: adapter.save_pretrained, **plain})
    write_text(folder / CARD, model_card(run, for_unet=bool(plain)))


def published(run: Finished) -> list[str]:
    """Return the files of a finished run to upload, as patterns within its folder."""
    sheets = [] if run.result is None else [sheet_name(run.step)]
    return [f"{ADAPTER}/*", f"{T2IADAPTER}/*", CARD, CONFIG, *sheets]


def sheet_name(step: int) -> str:
    """Return the path of the validation grid of ``step``, relative to the run's folder."""
    return f"validation/step-{step:06d}.png"


def model_card(run: Finished, for_unet: bool = True) -> str:
    """Write the model card: Markdown with the metadata block that the Hugging Face hub reads.

    for_unet: whether it is a T2I-Adapter, not one for a transformer.
    """
    settings, condition, base = run.settings, run.settings.condition, _public_name(run.settings.base.name)
    place = str(BASES[base].id_or_path) if base in BASES else settings.base.name
    masks = ("of the data" if run.own_masks else _joined(asdict(settings.mask))) + full_masks(settings)
    kind = "A T2I-Adapter" if for_unet else "An adapter for a transformer"
    title, evaluation = f"Local {condition.kind} adapter for {base}", _evaluation(run)
    metadata = ModelCardData(
        library_name="diffusers",
        base_model=None if is_local(place) else place,  # the hub accepts ids only
        tags=[*(["t2iadapter"] if for_unet else []), "localctl", "text-to-image", "diffusers-training", condition.kind],
        model_name=title if evaluation else None,  # required beside eval_results
        eval_results=evaluation or None,
    )
    body = f"""# {title}

{kind} that makes the base follow a {condition.kind} condition inside a mask and leaves it free outside
(white = controlled). Trained with localctl for {run.step} steps.

| trained with | |
|---|---|
| base | {base} (frozen) |
| condition | {_joined(condition.recorded())} |
| masks | {masks} |
| loss | denoising + {_joined(asdict(settings.loss))} |
| optimizer | AdamW, {settings.lr_scheduler} from {settings.learning_rate:g}, batch {effective_batch(settings)} |
| timesteps | {settings.timestep_sampling}; {settings.proportion_empty_prompts:.0%} empty prompts |
| seed | {settings.seed} |
"""
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}{_figures(run)}{_usage(settings, for_unet)}"))


def full_masks(settings: TrainSettings) -> str:
    """Return a clause on masks of the whole image in training; without any, an empty string."""
    share = settings.proportion_full_masks
    return f", but trained on the whole image in {share:.0%} of the samples" if share else ""


def effective_batch(settings: TrainSettings) -> int:
    """Return the samples per step and process."""
    return settings.train_batch_size * settings.gradient_accumulation_steps


def _evaluation(run: Finished) -> list[EvalResult]:
    """Return the scores of the last validation in the form of the hub."""
    if run.result is None or not run.result.fidelity.scored:
        return []
    name, measured = _public_name(run.settings.data.name), run.result.fidelity
    about: dict[str, Any] = {"task_type": "text-to-image", "dataset_type": name, "dataset_name": f"{name}, held out"}
    values = {"f1": measured.f1, "precision": measured.precision, "recall": measured.recall}
    return [
        EvalResult(
            **about, metric_type=metric, metric_name=f"{metric} of edges in the mask", metric_value=round(value, 3)
        )
        for metric, value in values.items()
    ]


def _figures(run: Finished) -> str:
    if run.result is None:
        return ""
    config, fidelity, references = run.settings.validation, run.result.fidelity, run.references
    sheet = f"![Condition with the mask's outline, generated, its condition, real]({sheet_name(run.step)})"
    if not fidelity.scored:
        return f"\n## Held-out examples\n\nNot scored: their masks hold too few edges.\n\n{sheet}\n"
    rows, share = [("with the adapter", fidelity)], ""
    if references is not None:
        rows = [("base alone", references.base), *rows, ("real image through the VAE", references.round_trip)]
        share = f"The adapter goes {references.control(fidelity.f1):z.0%} of the way from the base to the ceiling. "
    table = "\n".join(f"| {name} | {f.f1:.3f} | {f.precision:.3f} | {f.recall:.3f} |" for name, f in rows)
    count = len(fidelity.per_case)
    return f"""
## Fidelity inside the mask

Canny edges of generated and real images, matched within 2 px inside the mask; {count} held-out
{"example" if count == 1 else "examples"}, {config.num_inference_steps} {config.scheduler} steps, \
guidance {config.guidance_scale:g}. {share}So few
examples are for watching a run; measure with more before comparing.

| | F1 | precision | recall |
|---|---|---|---|
{table}

{sheet}
"""


def _usage(settings: TrainSettings, for_unet: bool) -> str:
    weights = settings.adapter.level_weights
    levels = "" if weights is None else f" and the weights of the levels, {', '.join(f'{w:g}' for w in weights)}"
    inner = (
        f"\n`{T2IADAPTER}/` holds the same weights for `diffusers.T2IAdapter.from_pretrained`, without the masking"
        f"{levels}.\n"
    )
    return f"""
## Use

```python
from localctl import LocalAdapter, LocalAdapterControl, generate, load_pipeline

pipe = load_pipeline({_public_name(settings.base.name)!r})
adapter = LocalAdapter.from_pretrained("{ADAPTER}")
control = LocalAdapterControl(adapter, condition, mask)  # (C, H, W) and (1, H, W), both in [0, 1]
image = generate(pipe, "a prompt", control, seeds=[0]).images[0]
```
{inner if for_unet else ""}"""


def _public_name(base: str) -> str:
    """Return the name of a base for publication: of a folder its last part, on one line and without markup."""
    name = base
    if base not in BASES and is_local(base):
        # UTF-8 as on the disk, whatever the locale
        name = os.fsencode(Path(base).expanduser().resolve().name).decode(errors="replace")
    return re.sub(r"[\s`|<>\[\]]+", " ", name).strip()


def _joined(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def check_hub(token: str | None) -> None:
    """Raise ValueError if there is no token to push with, before hours of training."""
    if not (token or get_token()):
        raise ValueError("push_to_hub needs a token; run `hf auth login`, set HF_TOKEN or give --hub_token.")


def push(folder: Path, settings: TrainSettings, files: list[str], api: Any = None) -> str:
    """Upload the ``files`` (patterns) of ``folder``, without paths of this machine. Checkpoints and logs are not
    uploaded. A new repository is private unless ``hub_private_repo`` is false. Returns the repository's name:
    ``hub_model_id``, or that of the folder.

    Raises:
        OSError: the hub cannot be reached or refuses; the run's folder is unchanged.
    """
    api = api or HfApi(token=settings.hub_token)
    name = settings.hub_model_id or folder.resolve().name
    try:
        upload = prepare_upload(folder, files)
        name = api.create_repo(repo_id=name, exist_ok=True, private=settings.hub_private_repo).repo_id
        api.upload_folder(
            repo_id=name, folder_path=str(upload), allow_patterns=files, commit_message="Trained with localctl"
        )
    except OSError as error:  # errors of the network and of the hub are OSErrors, too
        private = " --private" if settings.hub_private_repo else ""
        raise OSError(
            f"The adapter is safe in {folder}, but could not be pushed to {name} ({first_line(error)}); push it later "
            f"with `hf upload {name} {folder / UPLOAD} .{private}`."
        ) from error
    remove(upload)
    return name


def prepare_upload(folder: Path, files: list[str]) -> Path:
    """Copy the ``files`` (patterns) to ``folder/hub``, without paths of this machine in settings; return that
    folder."""
    upload = folder / UPLOAD
    remove(upload)
    upload.mkdir(parents=True)
    for path in sorted({found for pattern in files for found in folder.glob(pattern) if found.is_file()}):
        target = upload / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            write_json(target, without_paths(read_json(path, "The file")), indent=2, sort_keys=True)
        elif path.suffix == ".yaml":
            values = without_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
            write_text(target, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        else:
            shutil.copyfile(path, target)
    return upload


def without_paths(value: Any) -> Any:
    """Return plain values with every path of this machine shortened to its last part."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and is_local(value) and ("/" in value or "\\" in value):
        return PureWindowsPath(value).name or value  # it accepts both kinds of slashes
    return value


def is_local(place: str) -> bool:
    """Return whether ``place`` is a path of this machine: absolute, in the home folder, or existing."""
    try:
        return (
            place.startswith(("/", "~", "./", "../"))
            or PureWindowsPath(place).is_absolute()
            or ("\n" not in place and Path(place).exists())
        )
    except (OSError, ValueError):  # too long, or with a NUL
        return False
