"""Scores of one answer, a file per metric; percent, the best of all gold answers counts."""
