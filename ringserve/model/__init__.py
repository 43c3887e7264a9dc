"""Loading of decoder-only transformers models whose attention runs over the ring."""
