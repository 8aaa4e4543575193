"""Studies on the embedded base, and what trains it. Not installed; imports localctl and is imported by nothing."""
