"""edgetune: fine-tune and compress PyTorch models on and for small devices."""

