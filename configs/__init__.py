"""Examples for `run_inference --config=configs/NAME.toml`: flags by name. Flags on the command line override them."""
