"""Recipes: one linear script per task."""
