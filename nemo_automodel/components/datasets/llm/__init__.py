"""Datasets for language models; each file is one format and ends in one ``make_*`` function."""
