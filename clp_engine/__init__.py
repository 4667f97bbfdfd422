"""clp-engine: one language model, steerable at inference time between several rewards."""

__version__ = "0.1.0"
