"""Training programs: forward, loss, the backward of what trains, and its update, as one ExecuTorch program."""
