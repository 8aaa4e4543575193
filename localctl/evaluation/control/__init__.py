"""In-mask control of adapters on held-out scenes: `python -m localctl.evaluation.control`."""
