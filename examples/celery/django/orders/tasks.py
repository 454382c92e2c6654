"""Tasks of this Django app. They do not know which broker runs them."""

from celery import shared_task
from django.db.models import F

from orders.models import Order


@shared_task(acks_late=True)
def ship(order_id: int) -> None:
    """Late ack: if the worker dies, another one ships it. It may run twice, and sets the same status then."""
    Order.objects.filter(pk=order_id).update(status="shipped")


@shared_task
def remind() -> None:
    """Sent by beat from the database, see the README."""
    Order.objects.update(reminders=F("reminders") + 1)
