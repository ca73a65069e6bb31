"""Layers that belong to no single paper.

Arrays carry their shape as a suffix: B batch, L length, S source length, D model width, H heads,
G key-value heads, K head width, F feed-forward width, V vocabulary, N layers, E experts.
"""
