"""Training: settings, one plain loop, optimizer, checkpoints, and the cache of the frozen prefix."""
