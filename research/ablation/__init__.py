"""Does each part of the method help? Trains and measures every variant on the embedded base, with intervals."""
