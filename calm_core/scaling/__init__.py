"""Scaling laws over size, data and K: plan a ladder of models, run it, fit its results, plot them."""
