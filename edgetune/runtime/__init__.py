"""Run exported programs: child processes, timing, this host and others."""
