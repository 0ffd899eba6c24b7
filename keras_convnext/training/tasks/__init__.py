"""What the trainer trains: one module a task."""
