"""What clients are told of tasks that no worker ended."""
