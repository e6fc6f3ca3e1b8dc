"""Answers from a model: key-value caches, greedy decoding, predictors of finished runs."""
