"""What is probed: tasks, where their images come from, their prompts and metrics."""
