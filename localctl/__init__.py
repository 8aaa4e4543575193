"""Local control of text-to-image diffusion models.

Vocabulary (one word, one meaning):

- *pixels*: float (B, 3, H, W) in [-1, 1]. *condition*: control image, float (B, C, H, W) in [0, 1].
- *mask*: float (B, 1, H, W) in [0, 1], 1 = controlled. White = controlled in every file, flag and image.
- *latents* z0, *noisy latents* z_t, *model output* (epsilon, v or sample), *predicted z0'*.
- *region*: a phrase of the prompt (or its own prompt) with a box or a mask, a strength, a start and an end
  (fractions of the outer sampling steps).
- *layout*: one prompt, size and regions. Boxes are xyxy in [0, 1]. Several prompts = a list of layouts.
- *control*: anything that steers the frozen U-Net while sampling. *base*: the frozen pipeline.
- *step*: one optimizer update.
"""

import lazy_loader as lazy

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
