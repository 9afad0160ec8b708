"""Converting states between libraries, storage formats and layouts."""
