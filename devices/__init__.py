"""Device descriptors, as YAML."""
