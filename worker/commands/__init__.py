"""The commands of `tokenmill`, one module each; the command line mounts their apps."""
