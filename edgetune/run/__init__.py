"""Running recipes: the fold over the steps, run folders, reuse, budgets, and what is made of a run."""
