"""Properties are judged by their answers, never by their time."""

from hypothesis import settings

settings.register_profile("das", deadline=None)
settings.load_profile("das")
