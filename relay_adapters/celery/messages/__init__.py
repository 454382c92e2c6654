"""What a Celery message is: read and written without Celery."""
