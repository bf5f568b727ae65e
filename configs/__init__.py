"""Settings for `run_inference --config`, as TOML."""
