"""Training runs: their description, their folder, and the check of who made them."""
