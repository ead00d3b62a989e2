"""Saved outcomes -> forecasts, and how good they are."""
