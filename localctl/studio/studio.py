"""What the tabs of one server share: its settings, its queue, its sessions and the models in memory."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from localctl.bases import SCHEDULERS, same_base
from localctl.files import first_line
from localctl.messages import is_out_of_memory
from localctl.studio.config import StudioConfig
from localctl.studio.jobs_queue import Check, JobQueue, Made, Waiting
from localctl.studio.sessions import Session, Sessions

if TYPE_CHECKING:
    from localctl.denoisers.abilities import Abilities

logger = logging.getLogger(__name__)
_SIZES = {"micro": (128, 128), "sd15": (512, 512), "sd21": (768, 768), "sdxl": (1024, 1024)}


@dataclass
class Studio:
    """One server.

    ``models``: those of the last job, which the next one uses again where they are the same. ``closing``: what the tabs
    ask to be called when the server ends.
    """

    config: StudioConfig
    jobs: JobQueue = field(default_factory=JobQueue)
    sessions: Sessions = field(default_factory=Sessions)
    models: Any = None
    closing: list[Callable[[], None]] = field(default_factory=list)

    def run(self, session: Session, work: Callable[[Callable[[Any], None], Check], None]) -> Iterator[Waiting | Made]:
        """Run ``work`` as a job of ``session``, see :meth:`JobQueue.run`; models are freed when memory ran out."""
        cancelled = threading.Event()
        session.running.add(cancelled)
        try:
            yield from self.jobs.run(work, cancelled)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                self.free()
            raise
        finally:
            session.running.discard(cancelled)

    def free(self) -> None:
        """Let go of the models in memory."""
        import gc

        import torch

        self.models = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def base_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the base was trained at; 512 where its files are not here yet."""
        known = next((size for name, size in _SIZES.items() if same_base(self.config.base, name)), None)
        if known is not None:
            return known
        return (512, 512) if self.abilities is None else self.abilities.size

    @cached_property
    def abilities(self) -> Abilities | None:
        """What the base can do; None for the bases known by name, which do all, and where its files are not here."""
        return None if any(same_base(self.config.base, name) for name in _SIZES) else self.config.abilities()

    def offers(self, setting: str) -> bool:
        """Return whether the page shows a setting: all but those that the base is known to ignore, and those that only
        some transformers have."""
        return setting != "true_cfg_scale" if self.abilities is None else self.abilities.offers(setting)

    @cached_property
    def schedulers(self) -> list[str]:
        """The schedulers that the page offers."""
        return list(SCHEDULERS) if self.abilities is None else self.abilities.schedulers

    def tokens(self, text: str) -> tuple[list[tuple[int, int]], int]:
        """Return the characters of each token of a prompt, and how many tokens the text encoder reads.

        By words where the tokenizer of the base is not on this machine yet.
        """
        name = "tokenizer" if self.abilities is None else self.abilities.tokenizer
        tokenizer = getattr(getattr(self.models, "pipe", None), name, None) or self._tokenizer
        if tokenizer is None:
            return [match.span() for match in re.finditer(r"\S+", text)], 75
        encoded = tokenizer(text, return_offsets_mapping=True, truncation=False, verbose=False)
        spans = [(first, last) for first, last in encoded["offset_mapping"] if last > first]
        limit = None if self.abilities is None else self.abilities.tokens
        if limit is not None and self.config.max_sequence_length is not None:
            limit = max(1, self.config.max_sequence_length)
        return spans, tokenizer.model_max_length - 2 if limit is None else limit - 1  # start and end, or the end alone

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from localctl.pipelines import resolve_base

        place = resolve_base(self.config.base, one_file=True).id_or_path
        try:
            name = "tokenizer" if self.abilities is None else self.abilities.tokenizer
            return AutoTokenizer.from_pretrained(place, subfolder=name, local_files_only=True)
        except (ValueError, OSError) as error:
            logger.info(f"the tokenizer of the base is not here yet ({first_line(error)}); phrases are marked by words")
            return None

    def close(self) -> None:
        """Cancel all jobs, close what the tabs have opened and delete all files of the sessions."""
        for close in self.closing:
            close()
        self.sessions.close()
