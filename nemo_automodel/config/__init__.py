"""Recipes as YAML: read, checked against the signatures of what they name, and turned into calls.

Nothing here imports torch or transformers: a mistake is reported in a fraction of a second. ``load`` is the way in.
"""

from nemo_automodel.config.config import Config, SectionConfig, load

__all__ = ["Config", "SectionConfig", "load"]
