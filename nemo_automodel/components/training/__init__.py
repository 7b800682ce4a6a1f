"""The loop's own parts: schedule, learning rate, randomness, compilation, metrics and the progress display."""
