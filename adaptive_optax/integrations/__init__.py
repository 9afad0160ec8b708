"""States and training loops of other libraries."""
