"""Tokens and their statistics: completions are drawn, and scored under policy and reference."""
