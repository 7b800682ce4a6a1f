"""Checkpoints: Hugging Face directories out, exact resume in, published so that a kill at any moment costs nothing."""
