"""The service: API, logs, stores, sink, client, command line. Never imports torch."""
