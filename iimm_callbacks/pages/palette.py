"""The colours of pages and pictures, for light and dark, and how well they stand out."""

from __future__ import annotations

# Text needs a contrast of 4.5 to what is behind it, lines and marks one of 3 (WCAG 2.2, 1.4.3 and
# 1.4.11); test_pages.py computes them. The light ones are also those of the PNG files.
LIGHT = {
    "paper": "#ffffff", "panel": "#f3f5f8", "ink": "#1b1f24", "quiet": "#565d66",
    "rule": "#d5d9df", "edge": "#7b828b",
    "blue": "#1a5fb4", "red": "#b3261e", "green": "#1e6b3c", "amber": "#8a5200",
    "violet": "#7b3fa0", "teal": "#0b6e75",
}  # fmt: skip
DARK = {
    "paper": "#14171b", "panel": "#1e2329", "ink": "#e8eaed", "quiet": "#aab2bb",
    "rule": "#3a414a", "edge": "#808993",
    "blue": "#7db4f5", "red": "#ff8f85", "green": "#74cf98", "amber": "#f0b65a",
    "violet": "#c9a0e8", "teal": "#62c9d1",
}  # fmt: skip
TEXT = ("ink", "quiet", "blue", "red", "green", "amber", "violet", "teal")
BEHIND = ("paper", "panel")
LEVEL = {"continue": "green", "warn": "amber", "stop": "red"}
SERIES = ("blue", "amber", "green", "violet", "red", "teal")  # of methods side by side
MARKS = ("o", "s", "^", "D", "v", "P")


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours by WCAG 2.2, from 1 (the same) to 21 (black on white).

    Args:
        one: As ``#rrggbb``.
        other: As ``#rrggbb``; the order does not matter.

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def variables(colours: dict[str, str]) -> str:
    """CSS declarations: each colour under its name."""
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
