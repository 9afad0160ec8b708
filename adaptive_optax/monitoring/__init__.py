"""Measuring, logging and plotting what a chain does."""
