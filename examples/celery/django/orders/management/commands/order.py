"""`manage.py order ITEM`: what a view would do."""

import time
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from orders.models import Order
from orders.tasks import ship


class Command(BaseCommand):
    help = "Order something, and wait until it is shipped."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("item")

    def handle(self, *args: Any, item: str, **options: Any) -> None:
        with transaction.atomic():
            order = Order.objects.create(item=item)
            # sent when the transaction is committed: the worker finds the order in the database
            ship.delay_on_commit(order.pk)
        deadline = time.monotonic() + 60
        while order.status != "shipped" and time.monotonic() < deadline:
            time.sleep(0.05)
            order.refresh_from_db()
        if order.status != "shipped":
            raise CommandError(f"order {order.pk} of {item} is not shipped after a minute; does a worker run?")
        self.stdout.write(f"order {order.pk} of {item}: {order.status}")
