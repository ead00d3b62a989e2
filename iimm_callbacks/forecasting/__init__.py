"""Outcomes on record -> forecasts, and how good they are."""
