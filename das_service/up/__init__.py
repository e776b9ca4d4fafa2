"""`das up`: one supervisor, an OS process per role, an embedded server, a folder."""
