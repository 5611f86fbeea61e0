"""The command `keras_learnbits`: reads its arguments, runs a subcommand, and reports errors."""

import os
import shlex
import sys

from keras_learnbits.command_line.options import PROGRAM, make_parser

# What shells report for a program that the user interrupted.
INTERRUPTED = 130


def main(arguments=None):
    """Runs the command line.

    An error that the user can correct is printed as one line on stderr, with exit code 2.

    Args:
        arguments: List of strings; by default those of the command line.

    Examples:
        >>> main(["--version"])  # doctest: +SKIP
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # TensorFlow reads it when it is first imported. By default it logs messages that users of the
    # command line cannot act on.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.command = shlex.join([PROGRAM, *arguments])
    try:
        options.run(options)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (OSError, ValueError) as error:
        parser.error(str(error))
