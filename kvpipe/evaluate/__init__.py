"""Scores of a trained student, item by item."""
