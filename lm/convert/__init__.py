"""Weights in and out: folders of Hugging Face's to runs of ours and back, exactly.

`importer.to_run` and `exporter.from_run` are the two ways; what an architecture is stands in one file of
`lm.convert.architectures`.
"""
