"""What space-time attention gains, from text alone: `python -m localctl.evaluation.spacetime`."""
