"""The command line, clp-engine."""
