"""An order, and how far it is."""

from django.db import models


class Order(models.Model):
    item = models.CharField(max_length=100)
    status = models.CharField(max_length=20, default="new")
    reminders = models.IntegerField(default=0)
