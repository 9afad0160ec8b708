"""Runs the trials: which ones are missing, how they are placed on devices, what is saved."""
