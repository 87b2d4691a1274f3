"""Operators between the layers that save less for backward than PyTorch's own."""
