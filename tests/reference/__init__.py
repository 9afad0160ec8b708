"""Slow NumPy float64 transcriptions of the methods, written from the papers and not from the library."""
