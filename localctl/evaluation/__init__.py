"""Evaluation that needs a base, adapters and data together: generated sets, their scores and their comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from localctl.lazy import lazy_names

if TYPE_CHECKING:
    from localctl.evaluation.compare import Comparison as Comparison
    from localctl.evaluation.sheets import contact_sheet as contact_sheet
    from localctl.evaluation.tables import latex as latex
    from localctl.evaluation.tables import markdown as markdown
    from localctl.evaluation.tables import plot as plot

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"compare": ["Comparison"], "sheets": ["contact_sheet"], "tables": ["latex", "markdown", "plot"]},
)

LAYOUTS = ("true", "auto")  # where the layouts of held-out captions come from
