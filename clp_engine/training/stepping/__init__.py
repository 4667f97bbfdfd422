"""The update of a step: gradients by micro-batch, the optimiser, and the numbers of both."""
