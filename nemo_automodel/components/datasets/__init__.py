"""From rows to micro-batches: sources -> tokenised samples -> order and packing -> batches."""
