"""From claims to messages, and to what becomes of them."""
