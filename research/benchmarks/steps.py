"""The training steps that the benchmarks compare: the product's own loop in several variants, and the plain step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from localctl.architectures import TEXT_CLASSES, BaseShape, Config
from localctl.data import Batch, Example
from localctl.diffusion import latent_size, posterior, scale_latents, timesteps_from_uniform
from localctl.pipelines import encode_captions, encode_prompts
from localctl.prompt_embeds import PromptEmbeds
from localctl.signals import Interrupt
from localctl.training.adapter_plan import plan_adapter
from localctl.training.cost import Cost, count_step
from localctl.training.folder import RunFolder
from localctl.training.loop import Run
from localctl.training.schedule import FIRST_LOCAL, first_local_step
from localctl.training.settings import TrainSettings
from localctl.training.state import TrainState, new_accelerator, new_state
from research.benchmarks.shapes import shape_of

TOKENS = 77
ENCODERS = ("vae", "text_encoder", "text_encoder_2")  # not loaded where all is cached
ROWS = 600_000  # of the dataset that the batches stand for


@dataclass(frozen=True)
class Variant:
    """A training step to measure.

    cached: batches bring their encodings. plain: the step of diffusers' script. settings: changes of the run's. change:
    of the state, before the first step. logged: a row of the log is computed after every step, not once per block.
    """

    name: str
    cached: bool = True
    plain: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    change: Callable[[TrainState], None] | None = None
    logged: bool = False


def _in_format(memory_format: torch.memory_format, state: TrainState) -> None:
    for part in (state.models.network, state.models.vae):
        part.to(memory_format=memory_format)


def _not_fused(state: TrainState) -> None:
    for group in state.optimizer.param_groups:
        group["fused"] = False


def _one_by_one(state: TrainState) -> None:
    models = state.models
    moments, texts = models._encode_moments, models.text_states
    models._encode_moments = lambda pixels: torch.cat([moments(one[None]) for one in pixels])  # type: ignore[method-assign]
    models.text_states = lambda captions: PromptEmbeds.join([texts([one]) for one in captions])  # type: ignore[method-assign]


def _trained_unet(state: TrainState) -> None:
    state.models.network.requires_grad_(True)


def _frozen_unet(state: TrainState) -> None:
    state.models.network.requires_grad_(False)


PLAIN = Variant("plain step", cached=False, plain=True)
PLAIN_FROZEN = Variant("plain step, U-Net frozen", cached=False, plain=True, change=_frozen_unet)
CACHED = Variant("cached")
LIVE = Variant("live", cached=False)
COMPILED = Variant("cached, compiled", settings={"compile": True})
LIVE_COMPILED = Variant("live, compiled", cached=False, settings={"compile": True})
CHANNELS_LAST_COMPILED = Variant(
    "cached, compiled, channels_last", settings={"compile": True}, change=partial(_in_format, torch.channels_last)
)
CHANNELS_LAST = Variant("cached, channels_last", change=partial(_in_format, torch.channels_last))
CONTIGUOUS = Variant("cached, without channels_last", change=partial(_in_format, torch.contiguous_format))
CHECKPOINTED = Variant("cached, gradient checkpointing", settings={"gradient_checkpointing": True})
NOT_FUSED = Variant("cached, AdamW not fused: the host waits every step", change=_not_fused)
ONE_BY_ONE = Variant("live, encoded one by one", cached=False, change=_one_by_one)
WITHOUT = (
    Variant("cached, logged every step", logged=True),
    Variant("cached, U-Net's gradients on", change=_trained_unet),
)


class _Nothing:
    """A source of data that only has a length: the batches are made beforehand."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        raise IndexError(index)


class Steps:
    """Makes steps of one variant: ``steps(5)``.

    settings: of the run, without the variant's changes. folder: an output folder of its own. :meth:`use` says which
    batches are used.
    """

    def __init__(self, variant: Variant, settings: TrainSettings, folder: Path) -> None:
        self.variant, self.settings = variant, replace(settings, **variant.settings)
        self.accelerator = new_accelerator(self.settings)
        self.state = new_state(self.settings, self.accelerator, ENCODERS if variant.cached else ())
        self.batches: Iterator[Batch] = iter(())
        self.bar = tqdm(disable=True)
        self._run: Run | None = None
        if variant.plain:
            self._optimizer = _make_plain(self.state, self.settings)
        if variant.change is not None:
            variant.change(self.state)
        if not variant.plain:
            self.state.info[FIRST_LOCAL] = first_local_step(self.settings)
            self._run = Run(self.state, _Nothing(ROWS), None, RunFolder(folder), None, Interrupt(None))

    def use(self, pool: Sequence[Batch]) -> None:
        """Take the batches of ``pool`` in turns from now on; their pixels and encodings are on the CPU. The encoding of
        a caption also stands for that of an empty one."""
        if self.variant.cached and pool[0].texts is not None:
            self.state.models.empty_text = pool[0].texts[:1]
        self.batches = _visits(pool, cached=self.variant.cached)

    def __call__(self, count: int) -> None:
        """Make ``count`` steps."""
        state = self.state
        for _ in range(count):
            if self._run is None:
                self._plain(next(self.batches))
                continue
            self._run._step(self.batches, self.bar)
            if self.variant.logged:
                state.stats.row(state.models.num_train_timesteps, self.accelerator.gather)
        if self._run is not None and not self.variant.logged:
            state.stats.row(state.models.num_train_timesteps, self.accelerator.gather)

    def _plain(self, batch: Batch) -> None:
        """Make a step as diffusers' script does: encode every image and caption, leave the U-Net's gradients on, and
        read the loss back."""
        models, device = self.state.models, self.accelerator.device
        pipe, pixels = models.pipe, batch.pixels.to(device)
        with torch.no_grad():
            posterior = models.vae.encode(pixels.to(models.vae.dtype)).latent_dist
            latents = scale_latents(models.vae, posterior.sample().float())
        texts, _ = encode_prompts(pipe, list(batch.captions))
        noise = torch.randn_like(latents)
        uniform = torch.rand(len(latents), device=device, dtype=torch.float64)
        timesteps = timesteps_from_uniform(uniform, models.num_train_timesteps, "cubic")
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        with self.accelerator.autocast():
            features = models.plain_adapter.adapter(batch.condition.to(device))
            output = models.network(
                noisy.to(models.dtype),
                timesteps,
                encoder_hidden_states=texts.states,
                down_intrablock_additional_residuals=[feature.to(models.dtype) for feature in features],
            ).sample
            loss = F.mse_loss(output.float(), noise)
        self.accelerator.backward(loss)
        clip_grad_norm_(models.plain_adapter.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.bar.set_postfix(loss=loss.detach().item())

    def release(self) -> None:
        """Free what the variant holds."""
        if self._run is not None:
            self._run.folder.release()
        self.accelerator._models.clear(), self.accelerator._optimizers.clear()
        del self.state, self.batches, self._run


def _make_plain(state: TrainState, settings: TrainSettings) -> torch.optim.Optimizer:
    """Undo what the plain step does not have, and return its optimizer."""
    _in_format(torch.contiguous_format, state)
    state.models.network.requires_grad_(True)
    return torch.optim.AdamW(
        state.models.plain_adapter.parameters(), lr=settings.learning_rate, weight_decay=settings.adam_weight_decay
    )


def _visits(pool: Sequence[Batch], cached: bool) -> Iterator[Batch]:
    """Yield the batches for ever. Without encodings, every visit has new keys and captions, as in the first epoch."""
    for visit, batch in zip(itertools.count(), itertools.cycle(pool)):
        if cached:
            yield batch
            continue
        keys, captions = (tuple(f"{text} {visit}" for text in texts) for texts in (batch.keys, batch.captions))
        yield replace(batch, keys=keys, captions=captions, moments=None, texts=None)


@torch.no_grad()
def with_encodings(batch: Batch, pipe: Any) -> Batch:
    """Return ``batch`` with its images and captions encoded by ``pipe``, as a cache brings them."""
    moments = torch.cat(posterior(pipe.vae, batch.pixels.to(pipe.vae.device)), dim=1)
    return replace(batch, moments=moments.cpu(), texts=encode_captions(pipe, batch.captions).to("cpu"))


def random_texts(parts: Mapping[str, Config], count: int) -> PromptEmbeds:
    """Return random prompt embeddings of ``count`` captions, for the base with these configs."""
    known = torch.Generator().manual_seed(0)
    states = torch.randn(count, TOKENS, parts["unet"]["cross_attention_dim"], generator=known)
    pooled = parts.get("text_encoder_2", {}).get("projection_dim")
    return PromptEmbeds(states, None if pooled is None else torch.randn(count, pooled, generator=known))


def with_random_encodings(batch: Batch, parts: Mapping[str, Config]) -> Batch:
    """Return ``batch`` with encodings of the right shapes, for which no base is loaded."""
    height, width = batch.pixels.shape[-2:]
    mean = torch.randn(len(batch), 4, *latent_size(height, width, 8), generator=torch.Generator().manual_seed(0))
    moments = torch.cat([mean, torch.full_like(mean, 0.1)], dim=1)
    return replace(batch, moments=moments, texts=random_texts(parts, len(batch)))


def random_batches(
    count: int, batch: int, size: tuple[int, int], parts: Mapping[str, Config], pinned: bool = False
) -> list[Batch]:
    """Return batches of noise with random encodings in half precision, for the base with the configs ``parts``, on the
    CPU; pinned: in pinned memory, as a loader for a GPU returns them."""
    known = torch.Generator().manual_seed(0)

    def place(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if pinned else tensor

    def one(index: int) -> Batch:
        mask = torch.zeros(batch, 1, *size)
        mask[..., size[0] // 4 : -size[0] // 4, size[1] // 4 : -size[1] // 4] = 1
        made = Batch(
            keys=tuple(f"{index}-{row}" for row in range(batch)),
            epochs=(0,) * batch,
            captions=tuple(f"image {index} {row} " + "of a street in the rain " * 3 for row in range(batch)),
            pixels=place(2 * torch.rand(batch, 3, *size, generator=known) - 1),
            condition=place((torch.rand(batch, 1, *size, generator=known) > 0.9).float()),
            mask=place(mask),
        )
        encoded = with_random_encodings(made, parts)
        assert encoded.moments is not None and encoded.texts is not None
        texts = encoded.texts.to("cpu", torch.bfloat16)
        pooled = None if texts.pooled is None else place(texts.pooled)
        return replace(encoded, moments=place(encoded.moments.half()), texts=PromptEmbeds(place(texts.states), pooled))

    return [one(index) for index in range(count)]


class Work:
    """The FLOPs of an image on a known base, counted on the meta device as `train_adapter.py --dry_run` does; a text
    encoder takes two for each token and weight without the embeddings."""

    def __init__(self, base: str, settings: TrainSettings, size: tuple[int, int], tiny: bool = False) -> None:
        self._parts, self._size = shape_of(base, whole=True, tiny=tiny), size
        self._options = plan_adapter(settings, BaseShape(self._parts)).options

    @cached_property
    def frozen(self) -> Cost:
        """The step with a frozen U-Net, and the VAE's encoder."""
        return count_step(BaseShape(self._parts), self._options, self._size)

    @cached_property
    def plain(self) -> float:
        """The step with gradients of the U-Net's weights."""
        shape = BaseShape(self._parts)
        unet = shape.build("unet").requires_grad_(True)
        flops = count_step(shape, self._options, self._size).flops
        unet.requires_grad_(False)  # as whoever else uses it expects
        return flops

    @cached_property
    def text(self) -> float:
        """The text encoders."""
        built = [BaseShape(self._parts).build(part) for part in TEXT_CLASSES if part in self._parts]
        weights = [item for part in built for item in part.named_parameters()]
        return 2.0 * TOKENS * sum(p.numel() for name, p in weights if "embedding" not in name)

    def of(self, variant: Variant) -> float:
        """Return the FLOPs of an image in a step of ``variant``, without what checkpointing repeats."""
        step = self.plain if variant.plain else self.frozen.flops
        return step if variant.cached else step + self.frozen.vae_flops + self.text
