"""Weights read from one short array through a hash: gathered, gradients added up, without an index."""
