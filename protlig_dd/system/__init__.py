"""Files, devices, signals and processes; knows nothing of proteins."""
