"""Several processes that train as one: who they are, whose work is which, how they fail together, a sharded base model."""
