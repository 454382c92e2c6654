"""Control, replies and events, which are streams and no jobs."""
