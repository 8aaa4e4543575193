"""Train and evaluate from Python: the functions behind the command-line programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from localctl.caching import cache as caching
from localctl.caching.cache import CacheResult
from localctl.caching.settings import CacheSettings
from localctl.evaluation import fid
from localctl.evaluation.compare import Comparison, compare
from localctl.evaluation.scorer import make_scorer
from localctl.evaluation.settings import FidSettings
from localctl.launchers import read_launcher
from localctl.messages import log_to_screen
from localctl.metrics.clip import Clip
from localctl.metrics.extractors import MICRO_CLIP
from localctl.training.events import Scorer
from localctl.training.loop import TrainResult, prepare
from localctl.training.settings import ALIASES, FREE_GROUPS, TrainSettings

Say = Callable[[str], None]


def train_settings(*choices: str) -> TrainSettings:
    """Return training settings from groups and values as on the command line, over the defaults.

    For example, ``train_settings("experiment=paper_canny", "data.path=photos", "learning_rate=1e-4")``. Without
    arguments, the result equals ``TrainSettings()``. ValueError for an unknown key or option, naming the nearest known
    one, and for an invalid value.
    """
    from localctl.cli.config import load_config  # composes the files of config/

    return load_config(choices, TrainSettings, aliases=ALIASES, free_groups=FREE_GROUPS)


def train(settings: TrainSettings, say: Say | None = None, scorer: Scorer | None = None) -> TrainResult:
    """Train an adapter to the last step, or until a signal. It is saved in ``result.output_dir / "adapter"``.

    What the logger "localctl" logs meanwhile, at INFO and above, is printed.

    Args:
        settings: from :func:`train_settings`, or built in Python.
        say: deprecated; is called with each message instead of printing it. Add a handler to the logger "localctl".
        scorer: computes the score for early stopping instead of ``settings.early_stopping.metric``.

    Raises:
        ValueError: settings, data or the output folder are invalid or do not fit each other.
        OSError: a file could not be written.
        NotFiniteError: a loss or gradient is not finite; it was not applied to the weights.
    """
    if settings.dry_run:
        raise ValueError("dry_run trains nothing; see localctl.training.cost.report, or set dry_run=False.")
    with _shown(say, slurm=True, tolerant=True, first_process_only=True):
        return prepare(settings, scorer or make_scorer(settings)).train()


def cache(settings: CacheSettings) -> CacheResult:
    """Encode the images and captions of a training's dataset once: `localctl cache`. A training whose settings name the
    same ``data.encodings_dir`` reads them.

    Args:
        settings: from :func:`cache_settings`, or built in Python.

    Raises:
        ValueError: the settings or the data cannot be used, or Ray is missing.
        OSError: a file could not be written, or a worker failed; what is encoded stays.
    """
    if settings.dry_run:
        raise ValueError("dry_run caches nothing; see localctl.caching.estimate.report, or set dry_run=False.")
    with _shown(None):
        return caching.cache(settings)


def cache_settings(*choices: str) -> CacheSettings:
    """Return the settings of :func:`cache`; ``choices`` as for :func:`train_settings`, of which they have all."""
    from localctl.cli.config import load_config  # composes the files of config/

    return load_config(choices, CacheSettings, aliases=ALIASES, free_groups=FREE_GROUPS)


def generate_set(settings: FidSettings, say: Say | None = None) -> dict[str, Path]:
    """Generate the missing images of the sets that ``settings.prompts`` asks for; return their folders by set name.

    Settings and data are checked before the base is loaded: ValueError in one sentence.
    """
    with _shown(say):
        fid.generate(settings)
    return {name: settings.folder / name for name in settings.set_names}


def evaluate_fid(settings: FidSettings, say: Say | None = None) -> dict[str, Any]:
    """Measure the distance of generated images from photos: ``evaluate_fid.py`` ref, gen and score in one call.

    Returns:
        For each set by name: ``values`` (Fréchet distance, KID and further metrics of the extractor), ``warnings`` and
        ``provenance``. They are also written to a file beside the images.

    Raises:
        ValueError: data, adapter or extractor are missing; the reference or existing images have other settings.
    """
    with _shown(say):
        if settings.reference is None:
            fid.make_reference(settings)
        fid.generate(settings)
        return fid.score(settings)


def compare_sets(
    folders: Mapping[str, Path], clip: str | Path | None = "micro_clip", num_workers: int | None = None
) -> Comparison:
    """Measure how well sets of generated images follow their conditions, and compare the sets.

    Args:
        folders: folders from :func:`generate_set` by set name; one set must be without an adapter.
        clip: folder or hub id of the CLIPModel for the CLIP score; ``micro_clip``: that of the embedded base; None: no
            CLIP score.
        num_workers: number of Ray workers to share the images; None: this process measures them.

    Raises:
        ValueError: images are missing, or the sets differ in more than the adapter.
    """
    model = None if clip is None else Clip(MICRO_CLIP if clip == "micro_clip" else clip)
    return compare(folders, model, num_workers=num_workers)


@contextmanager
def _shown(say: Say | None, slurm: bool = False, **options: bool) -> Iterator[None]:
    """Within, print what is logged, or hand it to ``say``, which is deprecated. slurm: tasks of ``srun`` are joined."""
    if say is not None:
        text = 'say= is deprecated; add a handler to logging.getLogger("localctl") instead.'
        warnings.warn(text, DeprecationWarning, stacklevel=4)
    read_launcher(slurm=slurm)
    with log_to_screen(say, **options):
        yield
