"""The Delta tables: their files, their durable commits, and the process's one DuckDB."""
