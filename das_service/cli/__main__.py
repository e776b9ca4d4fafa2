"""`python -m das_service.cli`: the same as `das`."""

from das_service.cli import main

main()
