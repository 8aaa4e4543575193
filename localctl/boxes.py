"""Boxes xyxy."""

from __future__ import annotations

Box = tuple[float, float, float, float]


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes xyxy; 0 when both are empty."""
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum(max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)) - overlap
    return overlap / union if union > 0 else 0.0
