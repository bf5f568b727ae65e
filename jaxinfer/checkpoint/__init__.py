"""Model directories: what is in them, how weights get to devices, how they are written."""
