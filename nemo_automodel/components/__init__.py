"""The parts of a run. None imports another; each can be replaced from the YAML."""
