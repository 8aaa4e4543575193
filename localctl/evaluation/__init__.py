"""Measurements that need a base, adapters and data together."""

LAYOUTS = ("true", "auto")  # where the layouts of held-out captions come from
