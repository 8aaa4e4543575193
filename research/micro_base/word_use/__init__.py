"""Does the base use the words of a caption? `python -m research.micro_base.word_use`."""
