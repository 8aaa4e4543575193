"""Measurements: everything a reported figure is computed with."""

EXTRACTORS = ("micro_clip", "efficientnet_lite0", "fid", "clip")  # networks whose features are compared
