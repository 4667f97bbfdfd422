"""What a step does with it: gradients, the optimiser, metrics."""
