"""Where programs are timed: this host, a machine that ssh reaches, an Android phone on adb."""
