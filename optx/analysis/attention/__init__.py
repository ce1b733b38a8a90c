"""Attention as a support vector machine: which tokens a head separates, and by how much.

Source: "Transformers as Support Vector Machines", arXiv 2308.16898.
"""
