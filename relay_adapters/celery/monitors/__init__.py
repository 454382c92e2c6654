"""For the tools that look at Celery."""
