"""Run recipes: the fold over the steps, run folders, reuse, budgets, and predictions of a run's program."""
