"""Encodings on disk: what frozen networks compute of a dataset, once, for any number of trainings."""
