"""From rewards to the coefficients of a loss. Nothing here knows what a model is."""
