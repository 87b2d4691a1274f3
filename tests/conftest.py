"""What pytest must not collect: the scripts of the README, which train on import and are run by test_integrations."""

collect_ignore_glob = ["examples_*.py"]
