"""The command line `das`. `das --help` lists the commands; this file only finds out whether it can run here."""

import sys

NOT_INSTALLED = (
    "das: the command line needs more than the client (missing: {name}).\n"
    "  pip install 'das-service[service]'            the command line, the API and the sink\n"
    "  pip install 'das-service[worker,embedded]'    all of `das up`: with torch and a server\n"
    "In Python the client works as it is: from das_service.client import Client"
)


def main() -> None:
    """Run the command line and end the process: 0 done, 1 refused or failed, 2 wrongly asked or configured."""
    try:
        from das_service.cli.app import build_app  # absent where only the client is installed
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "das_service":
            raise
        sys.exit(NOT_INSTALLED.format(name=error.name))
    build_app()()
