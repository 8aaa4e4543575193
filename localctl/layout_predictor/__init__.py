"""From a sentence to a layout: find the objects of a prompt, and predict where they belong (arXiv 2304.03869)."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
