"""One file of settings per method; presets by name."""
