"""From our own operators to those of a target."""
