"""Training of the embedded base, part by part: `python -m research.micro_base` (resumable)."""
