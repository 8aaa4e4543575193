"""What `python -m research.layout_predictor.train` can be told, typed and checked."""

from __future__ import annotations

from dataclasses import dataclass, field

from localctl.records import record
from localctl.settings import REPORT_TO
from research.flags import check_least

SOURCES = ("micro", "coco")
ALIASES = {"train_data": "data.name", "instances": "data.instances", "stuff": "data.stuff"}
# Settings that may change when a run is continued; whatever is not named here may not.
FREE = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_steps", "validation_steps",
    "validation_count", "checkpointing_steps", "checkpoints_total_limit", "cpu_threads", "device", "data.instances",
    "data.stuff",
)  # fmt: skip


@record("predictor")
@dataclass(kw_only=True)
class PredictorConfig:
    """Shape of the transformer, as in :class:`localctl.layout_predictor.model.LayoutPredictor`.

    width: numbers per word.
    layers: blocks of attention.
    heads: of the attention; width is a multiple of it.
    hidden: width inside the blocks' feed-forward layers.
    buckets: rows of the table for the hashed pieces of words.
    components: Gaussians in the mixture of each centre.
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    hidden: int = 192
    buckets: int = 4096
    components: int = 6

    def __post_init__(self) -> None:
        least = {"width": 1, "layers": 1, "heads": 1, "hidden": 1, "components": 1, "buckets": 16}
        check_least(self, least, "predictor.")
        if self.width % self.heads:
            raise ValueError(f"predictor.width={self.width} is not a multiple of predictor.heads={self.heads}.")


@record("data")
@dataclass(kw_only=True)
class LayoutDataConfig:
    """Where placed things come from.

    name: ``micro``, the embedded scenes; ``coco``, annotations in MSCOCO's format.
    count: scenes at most; null = all there are, of micro 1500.
    instances: of coco, the annotation file of things (instances_train2017.json).
    stuff: of coco, that of stuff (stuff_train2017.json); null = things alone.
    min_area: of coco, things that cover less of the image than this are left out.
    max_objects: things of a sentence at most.
    """

    name: str = "micro"
    count: int | None = None
    instances: str | None = None
    stuff: str | None = None
    min_area: float = 0.02
    max_objects: int = 3

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            raise ValueError(f"Unknown data.name {self.name!r}; choose one of {', '.join(SOURCES)}.")
        if self.name == "coco" and self.instances is None:
            raise ValueError("data.name=coco needs annotations; give data.instances=instances_train2017.json.")
        check_least(self, {"count": 1, "max_objects": 2}, "data.")
        if not 0 <= self.min_area < 1:
            raise ValueError(f"data.min_area must lie in [0, 1), not {self.min_area}.")


@record("captions")
@dataclass(frozen=True)
class CaptionSettings:
    """How sentences are made in training.

    own: share of the visits that read the scene's own caption.
    lists: share of sentences without a relation.
    rename: share of the rest whose things have made-up names.
    mirror: also mirror the scenes.
    margin: how far apart centres are for a relation to be named.
    variants: different sentences per scene; null = another one at each visit.
    """

    own: float = 0.2
    lists: float = 0.1
    rename: float = 0.3
    mirror: bool = True
    margin: float = 0.11
    variants: int | None = None

    def __post_init__(self) -> None:
        for name in ("own", "lists", "rename"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"captions.{name} must lie in [0, 1], not {getattr(self, name)}.")
        if not 0 < self.margin < 0.5:
            raise ValueError(f"captions.margin must lie between 0 and 0.5, not {self.margin}.")
        check_least(self, {"variants": 1}, "captions.")


@record()
@dataclass(kw_only=True)
class LayoutTrainSettings:
    """A training of the layout predictor; ValueError for settings that make no sense.

    Steps are optimizer updates; the learning rate warms up, then falls to 0 as a cosine.

    output_dir: where log, checkpoints and the predictor go.
    overwrite_output_dir: begin anew in a folder that holds another run.
    seed: of everything random.
    report_to: tensorboard, wandb, all or none; stats.jsonl is always written.
    device: auto, cpu, cuda, ...
    cpu_threads: on a CPU; null = torch's own choice.
    max_train_steps: how long to train.
    train_batch_size: sentences per step.
    learning_rate: the highest of the schedule.
    lr_warmup_steps: steps until the highest learning rate.
    adam_weight_decay: AdamW's pull towards zero.
    max_grad_norm: gradients are scaled down to this norm.
    word_dropout: share of the words outside objects that training hides.
    name_dropout: share of the sentences whose objects are hidden, so that relations alone place them.
    relation_weight: of the loss of relations, added to the likelihood (``learning.Likelihood``); 0 = likelihood alone.
    known: the chance that the boxes of some objects of a sentence are shown, to predict the others from.
    logging_steps: steps between rows of the log.
    validation_steps: steps between validations; 0 = none.
    validation_count: held-out sentences with a relation per validation.
    checkpointing_steps: steps between checkpoints; 0 = none.
    checkpoints_total_limit: how many checkpoints are kept; null = all; at least 2.
    resume_from_checkpoint: `latest` or a checkpoint's path.
    """

    data: LayoutDataConfig = field(default_factory=LayoutDataConfig)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)

    output_dir: str = "outputs/layout_predictor"
    overwrite_output_dir: bool = False
    seed: int = 0
    report_to: str = "none"
    device: str = "auto"
    cpu_threads: int | None = None

    max_train_steps: int = 1800
    train_batch_size: int = 32
    learning_rate: float = 2e-3
    lr_warmup_steps: int = 100
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    word_dropout: float = 0.03
    name_dropout: float = 0.5
    relation_weight: float = 1.0
    known: float = 0.7

    logging_steps: int = 50
    validation_steps: int = 1000
    validation_count: int = 100
    checkpointing_steps: int = 250
    checkpoints_total_limit: int | None = 2
    resume_from_checkpoint: str | None = None

    def __post_init__(self) -> None:
        positive = ("max_train_steps", "train_batch_size", "logging_steps", "validation_count", "cpu_threads")
        check_least(self, dict.fromkeys(positive, 1) | {"checkpoints_total_limit": 2})
        check_least(self, dict.fromkeys(("lr_warmup_steps", "validation_steps", "checkpointing_steps"), 0))
        check_least(self, dict.fromkeys(("adam_weight_decay", "max_grad_norm", "learning_rate"), 0))
        for name in ("word_dropout", "name_dropout", "known"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], not {getattr(self, name)}.")
        if self.report_to not in REPORT_TO:
            raise ValueError(f"Unknown report_to {self.report_to!r}; choose one of {', '.join(REPORT_TO)}.")
