"""Computing hidden states with a model's own layers, packed or padded. Completions share their prompt where possible."""
