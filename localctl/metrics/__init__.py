"""Metrics: what every reported value is computed with."""

EXTRACTORS = ("micro_clip", "efficientnet_lite0", "fid", "clip")  # networks whose features the distances compare
