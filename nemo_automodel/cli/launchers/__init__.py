"""What ``automodel launch`` can write: one file for each kind of cluster, with what it needs to know and how it is submitted."""
