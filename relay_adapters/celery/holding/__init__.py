"""What this process holds, and how its leases are kept in every pool."""
