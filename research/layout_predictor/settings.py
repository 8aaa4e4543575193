"""The settings of `python -m research.layout_predictor.train`, typed and validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from localctl.records import NotNegative, Positive, Rate, Share, record
from localctl.settings import ReportTo

ALIASES = {"train_data": "data.name", "instances": "data.instances", "stuff": "data.stuff"}
# Settings that may change when a run is resumed; no others may.
FREE = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "report_to", "logging_steps", "validation_steps",
    "validation_count", "checkpointing_steps", "checkpoints_total_limit", "cpu_threads", "device", "data.instances",
    "data.stuff",
)  # fmt: skip


@record("predictor")
@dataclass(kw_only=True)
class PredictorConfig:
    """Shape of the transformer, as in :class:`localctl.layout_predictor.model.LayoutPredictor`.

    width: channels per word; a multiple of heads.
    layers: transformer blocks.
    heads: attention heads.
    hidden: channels inside the blocks' feed-forward layers.
    buckets: rows of the embedding table for hashed pieces of words.
    components: Gaussians in the mixture of each centre.
    """

    width: Positive = 96
    layers: Positive = 4
    heads: Positive = 4
    hidden: Positive = 192
    buckets: Annotated[int, Field(ge=16)] = 4096
    components: Positive = 6

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"predictor.width={self.width} is not a multiple of predictor.heads={self.heads}.")


@record("data")
@dataclass(kw_only=True)
class LayoutDataConfig:
    """The source of the placed scenes.

    name: ``micro``, the embedded scenes; ``coco``, annotations in MSCOCO's format.
    count: most scenes to use; null = all of coco, 1500 of micro.
    instances: for coco, the annotation file of things (instances_train2017.json).
    stuff: for coco, the annotation file of stuff (stuff_train2017.json); null = things alone.
    min_area: for coco, things that cover a smaller share of the image are left out.
    max_objects: for coco, most things per image.
    """

    name: Literal["micro", "coco"] = "micro"
    count: Positive | None = None
    instances: str | None = None
    stuff: str | None = None
    min_area: Annotated[float, Field(ge=0, lt=1)] = 0.02
    max_objects: Annotated[int, Field(ge=2)] = 3

    def __post_init__(self) -> None:
        if self.name == "coco" and self.instances is None:
            raise ValueError("data.name=coco needs annotations; give data.instances=instances_train2017.json.")


@record("captions")
@dataclass(frozen=True)
class CaptionSettings:
    """How training makes sentences about the scenes.

    own: share of the visits that use the scene's own caption.
    lists: share of the other sentences that state no relation.
    rename: share of the other sentences whose things have made-up names.
    mirror: also mirror the scenes.
    margin: least distance of two centres for a relation to be stated, as a share of the image's side.
    variants: different sentences per scene; null = a new one at each visit.
    """

    own: Share = 0.2
    lists: Share = 0.1
    rename: Share = 0.3
    mirror: bool = True
    margin: Annotated[float, Field(gt=0, lt=0.5)] = 0.11
    variants: Positive | None = None


@record()
@dataclass(kw_only=True)
class LayoutTrainSettings:
    """A training of the layout predictor. Raises ValueError for values out of range.

    Steps are optimizer updates; the learning rate warms up, then falls to 0 as a cosine.

    output_dir: folder of log, checkpoints and the predictor.
    overwrite_output_dir: start anew in a folder that holds another run.
    seed: seed of all random numbers.
    report_to: tensorboard, wandb, all or none; stats.jsonl is always written.
    device: auto, cpu, cuda, ...
    cpu_threads: CPU threads; null = torch's choice.
    max_train_steps: steps to train in all.
    train_batch_size: sentences per step.
    learning_rate: peak of the schedule.
    lr_warmup_steps: steps until the peak.
    adam_weight_decay: weight decay of AdamW.
    max_grad_norm: gradients are clipped to this norm.
    word_dropout: share of the words outside objects that are hidden in training.
    name_dropout: share of the sentences whose objects are hidden, so that only relations can place them.
    relation_weight: weight of the loss of relations (``learning.Likelihood``); 0 = likelihood alone.
    known: probability that some boxes of a sentence are given, to predict the others from.
    logging_steps: steps between rows of the log.
    validation_steps: steps between validations; 0 = none.
    validation_count: held-out sentences per validation; each states a relation.
    checkpointing_steps: steps between checkpoints; 0 = none.
    checkpoints_total_limit: checkpoints to keep, at least 2; null = all.
    resume_from_checkpoint: `latest`, or the path of a checkpoint.
    """

    data: LayoutDataConfig = field(default_factory=LayoutDataConfig)
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    predictor: PredictorConfig = field(default_factory=PredictorConfig)

    output_dir: str = "outputs/layout_predictor"
    overwrite_output_dir: bool = False
    seed: int = 0
    report_to: ReportTo = "none"
    device: str = "auto"
    cpu_threads: Positive | None = None

    max_train_steps: Positive = 1800
    train_batch_size: Positive = 32
    learning_rate: Rate = 2e-3
    lr_warmup_steps: NotNegative = 100
    adam_weight_decay: Rate = 0.01
    max_grad_norm: Rate = 1.0
    word_dropout: Share = 0.03
    name_dropout: Share = 0.5
    relation_weight: float = 1.0
    known: Share = 0.7

    logging_steps: Positive = 50
    validation_steps: NotNegative = 1000
    validation_count: Positive = 100
    checkpointing_steps: NotNegative = 250
    checkpoints_total_limit: Annotated[int, Field(ge=2)] | None = 2
    resume_from_checkpoint: str | None = None
