"""In-mask control of adapters on held-out scenes: `python -m research.control_share`."""
