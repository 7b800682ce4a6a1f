"""The attention function that models train with."""
