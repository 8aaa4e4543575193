"""Measure what space-time attention gains, from text alone: `python -m research.spacetime`."""

LAYOUTS = ("true", "auto")  # sources of the layouts of held-out captions
ROWS = ("plain", "constant", "scheduled", "optimised")  # ways to generate an image
