"""Lowering to ExecuTorch. The only place that imports executorch."""
