"""What runs exported programs: child processes, the stopwatch, this host and others."""
