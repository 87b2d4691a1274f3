"""What is minimized, measured and compared for each task."""
