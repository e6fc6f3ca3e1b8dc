"""Answers from a model: caches, greedy decoding, finished runs that can be asked."""
