"""Pure statistics: no training, no files, no pictures."""
