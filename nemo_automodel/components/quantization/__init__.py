"""Weights and products in fewer bits."""
