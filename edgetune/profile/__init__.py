"""Device descriptors, cost prediction and measurement."""
