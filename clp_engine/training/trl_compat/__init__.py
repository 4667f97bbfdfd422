"""TRL's and transformers' conventions, where a script expects them."""
