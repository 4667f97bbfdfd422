"""Conventions of TRL and transformers that scripts rely on."""
