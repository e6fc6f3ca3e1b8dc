"""Scores of answers: exact match, F1, intervals, answer spans. No torch."""
