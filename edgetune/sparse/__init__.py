"""Sparse backpropagation."""
