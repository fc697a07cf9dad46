"""The forward processes, called graphs: one file per kind."""
