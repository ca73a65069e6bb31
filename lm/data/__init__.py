"""Where text becomes batches: sources, tokenizers, corpus on disk, rows. numpy and grain only."""
