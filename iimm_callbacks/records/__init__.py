"""Plain data of a run, its JSON and its files: looks, forecasts, verdicts, outcomes, journals."""
