"""From the logs to the tables: one owner reads on from what the tables name, commits durably, then frees the logs."""
