"""What Celery's workers have to know of a store in which tasks wait."""
