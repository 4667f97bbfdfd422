"""How hidden states are computed: a model's own layers, packed or padded, with prompts shared where they can be."""
