"""What the tests share: models, checkpoints, laws' cases, stand-ins."""
