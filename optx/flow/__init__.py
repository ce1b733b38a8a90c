"""Flows on the simplex that generate sequences of tokens, and their guidance."""
