"""Recipes as YAML: read, checked against the signatures of what they name, and turned into calls.

Nothing here imports torch or transformers: a mistake is reported in a fraction of a second. ``load`` is the way in.
"""

from nemo_automodel.config.config import Config, SectionConfig, load
from nemo_automodel.config.overrides import Override, parse_overrides

__all__ = ["Config", "Override", "SectionConfig", "load", "parse_overrides"]
