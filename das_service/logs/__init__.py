"""The logs: Redis Streams, what is recorded about them beside the tables, and whether both agree."""
