"""Control: reading and steering what a chain does."""
