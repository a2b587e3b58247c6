"""The command line, and the place where names become parts."""
