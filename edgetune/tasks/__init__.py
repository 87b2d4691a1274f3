"""Tasks: the loss, the quality metric, baselines and postprocessing of each."""
