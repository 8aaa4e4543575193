"""Predict a layout from a prompt: find its objects, and predict their boxes (arXiv 2304.03869)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
