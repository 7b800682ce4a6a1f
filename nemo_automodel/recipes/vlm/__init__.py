"""Recipes for vision-language models."""
