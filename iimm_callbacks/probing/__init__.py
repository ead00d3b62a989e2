"""A model in training -> looks, on any number of ranks, leaving no trace."""
