"""The command line, and the functions that turn names into parts."""
