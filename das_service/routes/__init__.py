"""The HTTP routes: each reads a request, calls what does the work, and says the answer."""
