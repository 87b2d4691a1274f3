"""Data sets: loaders, splits and batches."""
