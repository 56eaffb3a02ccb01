"""What happens before the first step: from a command line to objects."""
