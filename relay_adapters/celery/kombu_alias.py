"""Makes `broker="relay://…"` known to kombu.

kombu has no entry point for transports, but it loads the group `kombu.serializers` when it is imported: this
module is there for that. An error here would break every program that uses kombu, so it imports nothing but
kombu's own table, and guards even that. SERIALIZER is a serializer that nobody asks for.
"""

# with their topologies too: kombu looks these up when it switches to the next URL of a failover list
NAMES = [word + kind for word in ("relay", "relays") for kind in ("", "+unix", "+sentinel", "+cluster")]


def _add_aliases():  # type: ignore[no-untyped-def]
    try:
        from kombu.transport import TRANSPORT_ALIASES

        for name in NAMES:
            TRANSPORT_ALIASES.setdefault(name, "relay_adapters.celery.transport:Transport")
    except Exception:  # whatever kombu becomes, it must go on without us
        return


def _refuse(_data):  # type: ignore[no-untyped-def]
    raise TypeError("the serializer named relay only makes the relay:// transport known; use another one")


_add_aliases()
SERIALIZER = (_refuse, _refuse, "application/x-relay-transport", "utf-8")
