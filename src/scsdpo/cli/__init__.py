"""The command line: one file a command, and what turns users' mistakes into one line."""
