"""Choosing what trains: what each part of a layer is worth, what it takes, and the best that fits a budget."""
