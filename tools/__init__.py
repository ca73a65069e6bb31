"""Command-line verbs, each `python -m tools.<verb>`."""
