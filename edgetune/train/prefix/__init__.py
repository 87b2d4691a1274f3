"""The outputs of the frozen first stages, kept on disk: a later epoch starts behind them."""
