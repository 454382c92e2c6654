"""Settings for trying it out. CELERY_BROKER_URL is the only line that knows of relay."""

import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "relay://")
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True

SECRET_KEY = "of this example only"
DEBUG = True
TIME_ZONE = "UTC"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_celery_beat", "orders"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", BASE_DIR / "db.sqlite3"),
        "OPTIONS": {"timeout": 20},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
