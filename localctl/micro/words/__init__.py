"""Does the base use the words of a caption? `python -m localctl.micro.words`."""
