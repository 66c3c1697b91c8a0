"""The command line: one file a command. Knows terminals."""
