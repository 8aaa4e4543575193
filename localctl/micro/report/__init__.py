"""Figures and model card of the embedded base: `python -m localctl.micro.report`."""
