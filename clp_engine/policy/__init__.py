"""The conditioned policy, and models and files made from it."""
