"""Input and output of the process: standard streams, terminal text, JSON files."""
