"""Files, devices, signals and processes; nothing here depends on proteins."""
