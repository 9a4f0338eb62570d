"""Attention without the matrix of probabilities."""
