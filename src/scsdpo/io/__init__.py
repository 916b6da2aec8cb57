"""Where the process ends: standard streams, text on a terminal, files of JSON."""
