"""From a publish, or a dead letter, to jobs in the store and messages in mailboxes."""
