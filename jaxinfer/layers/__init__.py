"""Building blocks that model families share. Each parameter carries the logical names of its axes."""
