"""Adapters and layouts to and from the formats of other programs.

Layouts are converted in memory (bytes, text or parsed JSON in, a layout or files' contents out), so that a server never
opens a file that a client names.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
