"""Weights of the public reference implementation, in and out."""
