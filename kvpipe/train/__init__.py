"""One cell: the loop, its optimizer, its checkpoints."""
