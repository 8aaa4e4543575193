"""Measurements: everything a reported figure is computed with."""
