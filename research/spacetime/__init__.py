"""Measure what space-time attention gains, from text alone: `python -m research.spacetime`."""

LAYOUTS = ("true", "auto")  # sources of the layouts of held-out captions
