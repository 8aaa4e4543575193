"""Datasets: what to train on, in which order, and how samples become batches."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
