"""Programs around the engine: benchmarks, and the demonstration model's trainer."""
