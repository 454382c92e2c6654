"""`manage.py schedule SECONDS`: what one would click together in the admin."""

from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django_celery_beat.models import IntervalSchedule, PeriodicTask


class Command(BaseCommand):
    help = "Have beat send orders.tasks.remind every so many seconds."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("seconds", type=int)

    def handle(self, *args: Any, seconds: int, **options: Any) -> None:
        every, _ = IntervalSchedule.objects.get_or_create(every=seconds, period=IntervalSchedule.SECONDS)
        PeriodicTask.objects.update_or_create(
            name="reminders", defaults={"task": "orders.tasks.remind", "interval": every}
        )
        self.stdout.write(f"reminders every {seconds} s")
