"""Does each part of the method help? Every variant is trained and measured on the embedded base, with intervals."""
