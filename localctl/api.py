"""Training and evaluation as functions of their settings: what the programs do, from Python."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localctl.evaluation import fid
from localctl.evaluation.compare import Comparison, compare
from localctl.evaluation.scorer import make_scorer
from localctl.evaluation.settings import FidSettings
from localctl.messages import log_to_screen
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.training.events import Scorer
from localctl.training.loop import TrainResult, prepare
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

Say = Callable[[str], None]


def train_settings(*choices: str) -> TrainSettings:
    """Return the settings of a training as the command line reads them: groups and values, over the defaults.

    ``train_settings("experiment=paper_canny", "data.path=photos", "learning_rate=1e-4")``. Without any choice it is
    ``TrainSettings()``. ValueError naming the nearest known key or option, or what is wrong with a value.
    """
    from localctl.cli.config import load_config  # composes the files of config/

    return load_config(choices, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS)


def train(settings: TrainSettings, say: Say | None = None, scorer: Scorer | None = None) -> TrainResult:
    """Train an adapter to the last step, or until a signal; its folder is ``result.output_dir / "adapter"``.

    What the logger "localctl" logs meanwhile, at INFO and above, is printed.

    Args:
        settings: of :func:`train_settings`, or built in Python.
        say: deprecated; called with each message instead of printing it. Add a handler to the logger "localctl".
        scorer: gives the score for early stopping in place of ``settings.early_stopping.metric``.

    Raises:
        ValueError: settings, data or an output folder that do not fit.
        OSError: something could not be written.
        NotFiniteError: a loss or gradient is not finite; nothing was changed by it.
    """
    if settings.dry_run:
        raise ValueError("dry_run trains nothing; see localctl.training.cost.report, or set dry_run=False.")
    with _shown(say, tolerant=True, first_process_only=True):
        return prepare(settings, scorer or make_scorer(settings)).train()


def generate_set(settings: FidSettings, say: Say | None = None) -> dict[str, Path]:
    """Generate what is missing of the sets of images that ``settings.prompts`` asks for; their folders, by the name of
    the set. ValueError in one sentence before anything slow."""
    with _shown(say):
        fid.generate(settings)
    return {name: settings.folder / name for name in settings.set_names}


def evaluate_fid(settings: FidSettings, say: Say | None = None) -> dict[str, Any]:
    """How far generated images are from photos: ``evaluate_fid.py`` ref, gen and score, one after the other.

    Returns:
        By the name of each set its ``values`` (Fréchet distance, KID and what else the extractor has), ``warnings`` and
        ``provenance``; also written beside the images.

    Raises:
        ValueError: data, an adapter or an extractor that is not there; another reference or images of other settings.
    """
    with _shown(say):
        if settings.reference is None:
            fid.make_reference(settings)
        fid.generate(settings)
        return fid.score(settings)


def compare_sets(folders: Mapping[str, Path], clip: str | Path | None = "micro_clip") -> Comparison:
    """Measure sets of images, by name, against the condition that they were to follow and against each other.

    Args:
        folders: of :func:`generate_set`, one of them without an adapter.
        clip: CLIPModel of the CLIP score, a folder or hub id; ``micro_clip``: the embedded base's; None: no score.

    Raises:
        ValueError: images are missing, or the sets differ in more than the adapter.
    """
    return compare(folders, None if clip is None else Clip(MICRO_CLIP if clip == "micro_clip" else clip))


@contextmanager
def _shown(say: Say | None, **options: bool) -> Iterator[None]:
    """Within, print what is logged, or hand it to ``say``, which is deprecated."""
    if say is not None:
        text = 'say= is deprecated; add a handler to logging.getLogger("localctl") instead.'
        warnings.warn(text, DeprecationWarning, stacklevel=4)
    with log_to_screen(say, **options):
        yield
