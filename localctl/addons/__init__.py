"""Models that are put on a base for a while, and taken off without a trace: ControlNets, IP-Adapters, LoRAs, learned
words. Each is found and checked by the header of its file, then loaded; pickles are never read."""
