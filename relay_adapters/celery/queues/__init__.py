"""What is declared: exchanges, bindings and queues with their arguments, in the store and as this process knows it."""
