"""Objectives: what a row of tokens asks of a model."""
