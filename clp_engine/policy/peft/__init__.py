"""Reading and writing PEFT's adapters."""
