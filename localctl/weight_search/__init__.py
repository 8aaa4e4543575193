"""Optimising what a control does for one image: through the sampling, and through a CLIP that looks at the result."""
