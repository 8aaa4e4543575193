"""Measure what space-time attention gains, from text alone: `python -m research.spacetime`."""
