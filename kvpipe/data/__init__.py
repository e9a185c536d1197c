"""Records, their encodings and batches."""
