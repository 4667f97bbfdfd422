"""PEFT's adapters, read and written."""
