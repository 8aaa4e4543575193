"""Training of the embedded base, part by part: `python -m localctl.micro.build` (resumable)."""
