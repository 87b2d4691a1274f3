"""Training programs: forward, loss, backward and update as one ExecuTorch program."""
