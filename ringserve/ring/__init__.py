"""The ring: how tensors travel between the ranks of one epoch."""
