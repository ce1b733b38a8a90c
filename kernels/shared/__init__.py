"""Weights read from one short array through a hash: gathered, and their gradients added up, without an index."""
