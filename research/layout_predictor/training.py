"""A training run of the layout predictor.

``prepare`` raises every user error before slow work; ``Run.train`` takes the steps, logs, validates, saves and exports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from localctl.distributed import process_device
from localctl.layout_predictor.model import LayoutPredictor
from localctl.lock import FolderLock
from localctl.redaction import flat, recorded
from localctl.seeding import generator
from localctl.signals import Interrupt
from localctl.training.checkpoints import (
    LATEST,
    check_writable,
    find_checkpoint,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
    set_aside_later,
    sweep,
    sweep_folders,
    write_folders,
)
from localctl.training.trackers import STATS, check_report_to, make_tracker
from research.layout_predictor.captions import Caption
from research.layout_predictor.coco import CocoLayouts
from research.layout_predictor.data import MicroLayouts, Scenes, example
from research.layout_predictor.learning import Likelihood, likelihood, sample_known, sample_unread
from research.layout_predictor.measure import held_out_captions, relation_rate
from research.layout_predictor.settings import FREE, LayoutTrainSettings
from research.training_loop import learning_rate_at, updates

logger = logging.getLogger(__name__)
PREDICTOR, OPTIMIZER = "predictor", "optimizer.safetensors"
_MICRO_SCENES = 1500  # each also mirrored, and with x and y swapped


def make_scenes(settings: LayoutTrainSettings) -> Scenes:
    """Return the scenes to learn from. Raises ValueError for annotations that cannot be read."""
    data = settings.data
    if data.name == "micro":
        return MicroLayouts("train", data.count or _MICRO_SCENES, crowded=True)
    assert data.instances is not None
    return CocoLayouts(
        data.instances, data.stuff, count=data.count, min_area=data.min_area, max_objects=data.max_objects
    )


def prepare(settings: LayoutTrainSettings) -> Run:
    """Check folder, checkpoint and data, then make the model.

    Raises:
        ValueError: a user's error, in one sentence; :class:`~localctl.lock.FolderInUse` if another run has the folder.
        OSError: the disk is full or cannot be written.
    """
    check_report_to(settings.report_to)
    device = process_device(settings.device)
    folder = Path(settings.output_dir).expanduser()
    check_writable(folder)
    lock = FolderLock(folder)
    try:
        return _prepare(settings, folder, device, lock)
    except BaseException:
        lock.release()
        raise


def _prepare(settings: LayoutTrainSettings, folder: Path, device: torch.device, lock: FolderLock) -> Run:
    """Continue :func:`prepare` once the output folder is locked."""
    sweep(folder)
    sweep_folders(folder, (PREDICTOR,))
    checkpoint = find_checkpoint(folder, settings.resume_from_checkpoint)
    if checkpoint is None and settings.resume_from_checkpoint != LATEST and not settings.overwrite_output_dir:
        for name in (STATS, PREDICTOR):
            if (folder / name).exists():
                raise ValueError(
                    f"{folder} holds an earlier run; continue it with --resume_from_checkpoint latest, choose another "
                    "--output_dir, or pass --overwrite_output_dir to replace it."
                )
    scenes = make_scenes(settings)
    if settings.cpu_threads is not None:
        torch.set_num_threads(settings.cpu_threads)
    run = Run(settings, scenes, folder, device, lock)
    if checkpoint is not None:
        run.load(checkpoint)
        set_aside_later(folder, run.step)
    else:
        for step, path in list_checkpoints(folder).items():
            path.rename(folder / f"abandoned-checkpoint-{step}")
    return run


class Run:
    """A prepared training run; random numbers are keyed by seed and step, so a resumed run gives the same weights."""

    def __init__(
        self,
        settings: LayoutTrainSettings,
        scenes: Scenes,
        folder: Path,
        device: torch.device,
        lock: FolderLock,
    ) -> None:
        self.settings, self.scenes, self.folder, self.lock = settings, scenes, folder, lock
        self.step = 0
        state = torch.random.get_rng_state()
        torch.manual_seed(generator(settings.seed, "weights").initial_seed())
        sizes = scenes.sizes() if isinstance(scenes, CocoLayouts) else None
        self.model = LayoutPredictor(**asdict(settings.predictor), trained_on=settings.data.name, sizes=sizes)
        torch.random.set_rng_state(state)
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=settings.adam_weight_decay)
        self.validation: list[Caption] | None = None

    def train(self, stop: Callable[[int], bool] = lambda step: False) -> int:
        """Train to the last step and export; or save a checkpoint and stop on SIGINT, SIGTERM or ``stop(step)``.

        Returns the number of the signal that stopped the run, or 0.

        Raises:
            NotFiniteError: the loss is not finite.
            OSError: checkpoint, log or predictor could not be written; the message names what was saved.
        """
        settings = self.settings
        count = sum(parameter.numel() for parameter in self.model.parameters())
        logger.info(f"{len(self.scenes)} scenes of {self.scenes.name}; {count / 1e6:.2f} M parameters; {self.folder}")
        tracker = make_tracker(settings.report_to, self.folder, flat(recorded(settings)), start=self.step)
        try:
            with (
                Interrupt() as interrupt,
                tqdm(
                    total=settings.max_train_steps, initial=self.step, desc="training", unit="step", mininterval=1
                ) as bar,
            ):
                likelihoods: list[Likelihood] = []
                steps = range(self.step, settings.max_train_steps)
                for made, found in updates(self.optimizer, steps, self._rate, self._loss, settings.max_grad_norm):
                    self.step = made
                    likelihoods.append(found)
                    bar.update()
                    last = self.step == settings.max_train_steps
                    if self.step % settings.logging_steps == 0 or last:
                        row = _means(likelihoods) | {"learning_rate": self._rate(self.step - 1)}
                        likelihoods = []
                        bar.set_postfix({"nll": f"{row['nll_centre']:.3f}"}, refresh=False)
                        tracker.log(self.step, row)
                    stopped = bool(interrupt.signal) or stop(self.step)
                    every = settings.checkpointing_steps
                    if stopped or (every and (self.step % every == 0 or last)):
                        self.save()  # before validating, which may fail
                    if settings.validation_steps and (self.step % settings.validation_steps == 0 or last):
                        tracker.log(self.step, self._validate())
                    if stopped:
                        break
            if self.step >= settings.max_train_steps:
                self._export()
        finally:
            tracker.close()
            self.lock.release()
        return interrupt.signal

    def _rate(self, step: int) -> float:
        settings = self.settings
        return learning_rate_at(step, settings.learning_rate, settings.max_train_steps, settings.lr_warmup_steps)

    def _batch(self, step: int) -> Iterator[Caption]:
        """Yield the sentences of a step; the order of the scenes is shuffled anew each epoch."""
        settings, count = self.settings, len(self.scenes)
        first = step * settings.train_batch_size
        epoch, order = -1, torch.empty(0)
        for number in range(first, first + settings.train_batch_size):
            if number // count != epoch:
                epoch = number // count
                order = torch.randperm(count, generator=generator(settings.seed, "order", epoch))
            yield example(self.scenes, int(order[number % count]), epoch, settings.captions, settings.seed)

    def _loss(self, step: int) -> tuple[Tensor, Likelihood]:
        """Return the loss of a step, and its terms."""
        settings, model = self.settings, self.model
        captions = list(self._batch(step))
        known = sample_known(captions, settings.known, settings.seed, step)
        longest = model.config["max_words"]
        unread = sample_unread(captions, settings.word_dropout, settings.name_dropout, longest, settings.seed, step)
        found = likelihood(model, captions, known, unread)
        loss = found.likelihood + settings.relation_weight * found.relation
        return loss, Likelihood(found.centre.detach(), found.size.detach(), found.relation.detach(), found.count)

    def _validate(self) -> dict[str, float]:
        """Return the share of relations that hold in the most likely layouts for held-out sentences."""
        settings = self.settings
        if self.validation is None:
            micro = settings.data.name == "micro"
            source = MicroLayouts("val", 10**6) if micro else self.scenes
            number = min(settings.validation_count, 10**6 if micro else len(self.scenes))
            self.validation = held_out_captions(source, number, "training", settings.seed, settings.captions.margin)
        self.model.eval()
        rate = relation_rate(self.model, self.validation)
        self.model.train()
        logger.info(f"step {self.step}: {rate:.1%} of the relations of {len(self.validation)} sentences hold")
        return {"validation/relations": rate}

    def save(self) -> Path:
        """Save a checkpoint and return its folder."""
        settings = self.settings

        def write(path: Path) -> None:
            self.model.save_pretrained(path / PREDICTOR)
            states = self.optimizer.state_dict()["state"]
            tensors = {f"{index}.{name}": value for index, state in states.items() for name, value in state.items()}
            save_file(tensors, path / OPTIMIZER)

        info = {"settings": recorded(settings), "scenes": len(self.scenes)}
        return save_checkpoint(self.folder, self.step, write, keep=settings.checkpoints_total_limit, info=info)

    def load(self, checkpoint: Path) -> None:
        """Resume from a verified checkpoint. Raises ValueError if fixed settings or the number of scenes changed."""
        manifest = read_manifest(checkpoint)
        try:
            now, before = flat(recorded(self.settings)), flat(manifest["info"]["settings"])
            changed = [key for key in now if key not in FREE and before.get(key) != now[key]]
            if manifest["info"]["scenes"] != len(self.scenes):
                changed.append("number of scenes")
        except (KeyError, AttributeError):
            raise ValueError(f"{checkpoint} is not a checkpoint of a layout predictor; use another one.") from None
        if changed:
            lines = ", ".join(f"{key}: {before.get(key)} -> {now.get(key)}" for key in changed)
            raise ValueError(
                f"These changed since {checkpoint.name}: {lines}; change them back or choose another --output_dir."
            )
        weights = LayoutPredictor.from_pretrained(str(checkpoint / PREDICTOR)).state_dict()
        self.model.load_state_dict(weights)
        states: dict[int, dict[str, Any]] = {}
        for key, value in load_file(checkpoint / OPTIMIZER).items():
            index, _, name = key.partition(".")
            states.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": states})
        self.step = int(manifest["step"])

    def _export(self) -> None:
        """Write the finished predictor in half precision; it loads as float32.

        Raises:
            OSError: the predictor cannot be written; a checkpoint is saved to export it from.
        """
        small = LayoutPredictor(**{k: v for k, v in self.model.config.items() if not k.startswith("_")})
        small.load_state_dict(self.model.state_dict())
        try:
            write_folders(self.folder, {PREDICTOR: small.half().save_pretrained})
        except OSError as error:
            if self.step not in list_checkpoints(self.folder):
                self.save()
            raise OSError(
                f"{error}; checkpoint-{self.step} holds the whole training: free disk space, then resume with "
                "--resume_from_checkpoint latest."
            ) from error
        logger.info(f"Done: {self.folder / PREDICTOR}")


def _means(several: list[Likelihood]) -> dict[str, float]:
    total = sum(item.count for item in several)
    row = {
        f"nll_{name}": sum(float(getattr(item, name)) * item.count for item in several) / total
        for name in ("centre", "size")
    }
    return row | {"relation": sum(float(item.relation) for item in several) / len(several)}
