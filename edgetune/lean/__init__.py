"""Operators between the layers that keep less for backward than PyTorch's own."""
