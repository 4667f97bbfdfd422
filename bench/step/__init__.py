"""One training step: what it costs by phase, and the work in it, counted."""
