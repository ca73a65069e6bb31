"""Layers that families share.

Arrays carry their shape as a suffix: B batch, L length, S source length, D model width, H heads,
G key-value heads, K head width, F feed-forward width, V vocabulary; a file that has other letters says
what they are.
"""
