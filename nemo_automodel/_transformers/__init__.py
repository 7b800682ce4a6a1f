"""Where the package meets transformers: autoclasses, loading, the forward of a training step."""
