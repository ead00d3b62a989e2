"""The experiment of arXiv 2407.15731 again: its models, data, recipe and published values."""
