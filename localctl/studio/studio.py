"""What the tabs of one server share: its settings, its queue, its sessions and the models in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from localctl.studio.config import StudioConfig
from localctl.studio.jobs_queue import Check, JobQueue, Made, Waiting, is_out_of_memory
from localctl.studio.sessions import Session, Sessions


@dataclass
class Studio:
    """One server. ``models``: those of the last job, which the next one uses again where they are the same."""

    config: StudioConfig
    jobs: JobQueue = field(default_factory=JobQueue)
    sessions: Sessions = field(default_factory=Sessions)
    models: Any = None

    def run(
        self, session: Session, work: Callable[[Callable[[Any], None], Check], None]
    ) -> Iterator[Waiting | Made]:
        """Run ``work`` as a job of ``session``, see :meth:`JobQueue.run`; after a lack of memory the models are freed."""
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

    def close(self) -> None:
        """Cancel all jobs and delete all files of the sessions."""
        self.sessions.close()
