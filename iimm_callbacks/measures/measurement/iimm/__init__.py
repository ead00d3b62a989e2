"""A Space: the measurement (`iimm.py`), its card, requirements, tests and page."""
