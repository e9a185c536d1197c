"""Generated programs, run confined."""
