"""Encode the images and captions of a dataset once, for any number of trainings."""
