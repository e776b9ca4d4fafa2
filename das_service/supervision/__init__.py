"""Supervision out: from the online store by id, from the tables by join."""
