"""The configuration: typed keys, and how the command line composes them."""
