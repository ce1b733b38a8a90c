"""The interaction basis of a model's layers, what is computed in it, and degeneracies of linear layers."""
