"""Figures and model card of the embedded base: `python -m research.micro_base.report`."""
