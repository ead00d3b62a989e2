"""A run -> line, table, picture, page, card."""
