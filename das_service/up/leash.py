"""Starts a program that ends when its starter does: `python leash.py <starter's pid> <signal> program arguments...`.

The kernel sends the signal to the program when the starter ends, also when it is killed (Linux; elsewhere the program
just runs). A file of its own, run by path, so that it works between a fork and an exec in no time and from any thread.
"""

import os
import sys


def main(arguments: list[str]) -> None:
    """Ask for the signal, make sure that the starter still lives, and become the program."""
    starter, number, program = int(arguments[0]), int(arguments[1]), arguments[2:]
    if sys.platform == "linux":
        import ctypes  # noqa: PLC0415 - on Linux alone

        ctypes.CDLL(None).prctl(1, number)
        if os.getppid() != starter:
            sys.exit("the starter is gone")
    os.execv(program[0], program)  # noqa: S606 - it is told what to become


if __name__ == "__main__":
    main(sys.argv[1:])
