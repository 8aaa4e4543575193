"""Evaluation that needs a base, adapters and data together: generated sets, their scores and their comparison."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
