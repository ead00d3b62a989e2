"""A fine-tuned model that forgot too much -> its best mix with the untouched one."""
