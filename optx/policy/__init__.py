"""Policies of several modes: mixtures of experts, and the losses that train them."""
